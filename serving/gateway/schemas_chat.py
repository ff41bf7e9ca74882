"""`/v1/chat/completions`: answer a conversation, perhaps by calling tools.

Takes JSON; gives an `InferenceRequest`. It does not know templates or who asks.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from serving.engines._protocol import MAX_LOGPROBS
from serving.gateway.schemas_base import MAX_TOKENS, Body, Text
from serving.gateway.schemas_generation import Generation
from serving.gateway.schemas_tools import (
    MAX_TOOLS,
    Function,
    NamedTool,
    Tool,
    ToolCallEcho,
    ToolChoice,
    forced_call,
    tools_text,
)
from serving.messages import ChatPrompt, InferenceRequest, Turn

MAX_MESSAGES = 1024


class TextPart(Body):
    """A piece of a message; text is the only kind."""

    type: Literal["text"] = Field(description="Kind of the piece.")
    text: Text = Field(description="The text.")


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
Content = Text | Parts


class _Message(Body):
    name: str | None = Field(default=None, max_length=64, description="Accepted, not used.")


class InputMessage(_Message):
    """What the application or its user says."""

    role: Literal["system", "developer", "user"] = Field(description="Who speaks.")
    content: Content = Field(description="What is said.")

    def turn(self) -> Turn:
        """Return the message with its parts joined; `developer` is the newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        return Turn(role, _joined(self.content))


class AssistantMessage(_Message):
    """An earlier answer."""

    # Empty fields of an answer, which clients send back as it came.
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "annotations": ([], None),
        "audio": (None,),
        "function_call": (None,),
        "refusal": (None,),
        "token_ids": (None,),
    }

    role: Literal["assistant"] = Field(description="Who speaks.")
    content: Content | None = Field(default=None, description="What is said.")
    tool_calls: list[ToolCallEcho] | None = Field(
        default=None, max_length=MAX_TOOLS, description="What it called."
    )

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs `content` or `tool_calls`")
        return self

    def turn(self) -> Turn:
        """Return the message with its parts joined."""
        content = None if self.content is None else _joined(self.content)
        if not self.tool_calls:
            return Turn(self.role, content)
        calls = json.dumps([call.model_dump() for call in self.tool_calls], ensure_ascii=False)
        return Turn(self.role, content, tool_calls=calls)


class ToolMessage(_Message):
    """What a tool gave back."""

    role: Literal["tool"] = Field(description="Who speaks.")
    content: Content = Field(description="What the tool gave.")
    tool_call_id: str = Field(min_length=1, max_length=128, description="The call it answers.")

    def turn(self) -> Turn:
        """Return the message with its parts joined."""
        content = _joined(self.content)
        return Turn(self.role, content, name=self.name, tool_call_id=self.tool_call_id)


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class ChatCompletionRequest(Generation):
    """Answer a conversation."""

    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "modalities": (["text"], None),
        "reasoning_effort": ("none", None),
        "verbosity": ("medium", None),
        "functions": ([], None),
        "function_call": ("none", "auto", None),
    }

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="The newer name of `max_tokens`."
    )
    logprobs: bool | None = Field(default=None, description="Report log probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Alternatives; only with `logprobs`."
    )
    tools: list[Tool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        default=None, description="Whether a tool may, must or must not be called, or which one."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: at most one call; what the model adds is left out."
    )

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is only allowed with `logprobs` = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give `max_tokens` or `max_completion_tokens`, not both")
        if self.is_call_forced and self.structure() is not None:
            raise ValueError("`tool_choice` forces a call, which leaves no room for a structure")
        if self.is_call_forced:
            forced_call(self._callable())
        tools_text(self.tools or ())
        return self

    @property
    def is_call_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def may_call(self) -> bool:
        """Whether calls are to be looked for in the answer."""
        return bool(self.tools) and self.tool_choice != "none"

    def inference(self) -> InferenceRequest:
        """Return what is asked of the model; up to the context's end unless said otherwise."""
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        structure = forced_call(self._callable()) if self.is_call_forced else self.structure()
        max_tokens = self.max_completion_tokens or self.max_tokens
        sampling = self._sampling(max_tokens, num_logprobs, structure)
        tools = tools_text(self.tools or ()) if self.may_call else None
        prompt = ChatPrompt(tuple(message.turn() for message in self.messages), tools)
        return InferenceRequest((prompt,), sampling, self.n or 1, adapter=self.adapter)

    def _callable(self) -> list[Function]:
        """Return the functions that a forced call may name; raises ValueError if there is none."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.function.name
            functions = [function for function in functions if function.name == wanted]
        if not functions:
            raise ValueError("`tool_choice` forces a call of a tool that `tools` does not have")
        return functions


def _joined(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
