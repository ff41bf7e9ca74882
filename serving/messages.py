"""What the gateway and a replica say to each other: values that cross processes.

They are msgspec structures, so that a frame of them is decoded and checked in one step. It does not
know HTTP's JSON on one side or engines on the other.
"""

from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Literal, Protocol

import msgspec

from serving.engines._protocol import EngineStats, FinishReason, GrammarKind, TokenLogprob

# Codes of refusals: another replica may do better, or it would fail at this request as well.
ENGINE_FAILED = "engine_failed"
GENERATION_FAILED = "generation_failed"
Task = Literal["generate", "embed"]


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A value that crosses processes; its class name is its tag."""


class ServedModel(Message, frozen=True):
    """One version of a model that is offered; `context_tokens` fit in it, None: unknown."""

    name: str
    version: str
    published_s: int
    task: Task = "generate"
    context_tokens: int | None = None

    @property
    def reference(self) -> str:
        """The spelling that names exactly this version."""
        return f"{self.name}@{self.version}"


class TextPrompt(Message, frozen=True):
    """A text to continue."""

    text: str


class TokenPrompt(Message, frozen=True):
    """Token ids to continue."""

    token_ids: tuple[int, ...]


class Turn(Message, frozen=True):
    """One message of a conversation; `tool_calls` is the JSON text of OpenAI's list."""

    role: str
    content: str | None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: str | None = None


class ChatPrompt(Message, frozen=True):
    """A conversation to answer, written out by the model's own chat template.

    `tools` is the JSON text of OpenAI's list of tools, passed to the template.
    """

    turns: tuple[Turn, ...]
    tools: str | None = None


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Structure(Message, frozen=True):
    """What every answer must look like; see `serving.engines._protocol.Grammar`."""

    kind: GrammarKind
    text: str = ""


class Sampling(Message, frozen=True):
    """How every choice of a request is generated; `max_tokens` None: up to the context's end."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    structure: Structure | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    ignore_eos: bool = False


class InferenceRequest(Message, frozen=True):
    """Prompts, each continued `num_choices` times: choice p * num_choices + i is of prompt p.

    `request_id` is the gateway's, for logs and traces. `resumed` holds, choice by choice, tokens
    that a lost replica delivered; empty: none did. `finished` are choices that it ended: they are
    not generated again.
    """

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    num_choices: int = 1
    request_id: str = ""
    team: str = ""
    adapter: str | None = None
    resumed: tuple[tuple[int, ...], ...] = ()
    finished: tuple[int, ...] = ()

    @property
    def total_choices(self) -> int:
        """Sequences that are generated."""
        return len(self.prompts) * self.num_choices


class EmbeddingRequest(Message, frozen=True):
    """Texts or token ids to embed; `dimensions` keeps the first ones and normalises again."""

    inputs: tuple[TextPrompt | TokenPrompt, ...]
    dimensions: int | None = None
    request_id: str = ""
    team: str = ""


class Embedded(Message, frozen=True):
    """A vector for each input, and the tokens of all of them."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


class Started(Message, frozen=True):
    """The request was accepted; tokens of all its prompts."""

    prompt_tokens: int


class Delta(Message, frozen=True):
    """What was added to one choice; `cached_tokens` on its first one, of its prompt."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0


class Refused(Message, frozen=True):
    """The request ended without an answer; `code` and `param` are the OpenAI API's."""

    status: HTTPStatus
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None


Event = Started | Delta | Refused


class ReplicaStats(Message, frozen=True):
    """What one replica does now."""

    model: str
    version: str
    replica: str
    stats: EngineStats


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
