"""What the gateway and a replica say to each other: values that cross processes.

It does not know HTTP's JSON on one side or engines on the other.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from serving.engines._protocol import FinishReason, TokenLogprob


@dataclass(frozen=True)
class ServedModel:
    """A model that is offered: `name` is its id, `version` what that means now."""

    name: str
    version: str
    published_s: int

    @property
    def reference(self) -> str:
        """The spelling that names exactly this version."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class TextPrompt:
    """A text to continue."""

    text: str


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation to answer, written out by the model's own chat template."""

    turns: tuple[Turn, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True)
class Sampling:
    """How every choice of a request is generated; `max_tokens` None: up to the context's end."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None


@dataclass(frozen=True)
class InferenceRequest:
    """Prompts, each continued `num_choices` times: choice p * num_choices + i is of prompt p."""

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    num_choices: int = 1

    @property
    def total_choices(self) -> int:
        """Sequences that are generated."""
        return len(self.prompts) * self.num_choices


@dataclass(frozen=True)
class Started:
    """The request was accepted; tokens of all its prompts."""

    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """What was added to one choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The request ended without an answer; `code` and `param` are the OpenAI API's."""

    status: HTTPStatus
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None


Event = Started | Delta | Refused


class Events(Protocol):
    """Batches of events as they come: Started first, or Refused at any time and then nothing."""

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Return itself."""
        ...

    async def __anext__(self) -> list[Event]:
        """Return what happened since the last call."""
        ...

    async def aclose(self) -> None:
        """Cancel what still runs."""
        ...
