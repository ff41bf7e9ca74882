"""`/v1/event-streams`: a request whose answer a browser's EventSource will read.

Takes JSON; gives the request that it wraps. It does not know tickets.
"""

from typing import Annotated, Literal

from pydantic import Field

from serving.gateway.schemas_base import Body
from serving.gateway.schemas_chat import ChatCompletionRequest
from serving.gateway.schemas_completion import CompletionRequest


class CompletionStream(Body):
    """A completion to stream."""

    endpoint: Literal["/v1/completions"] = Field(description="What would be asked.")
    body: CompletionRequest = Field(description="With what body; `stream` is not needed.")


class ChatStream(Body):
    """A chat to stream."""

    endpoint: Literal["/v1/chat/completions"] = Field(description="What would be asked.")
    body: ChatCompletionRequest = Field(description="With what body; `stream` is not needed.")


EventStreamRequest = Annotated[CompletionStream | ChatStream, Field(discriminator="endpoint")]
