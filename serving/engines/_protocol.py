"""What every inference engine offers: token ids in, text and token ids out, piece by piece.

Takes and gives values only. It does not know about HTTP, prompts as text, or how an engine works.
Each plug-in package in this folder has `create(directory, options) -> Engine | EmbeddingEngine`.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Protocol

from pydantic import Field

from cluster.config import StrictModel

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class FinishReason(StrEnum):
    """Why a sequence ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


class GrammarKind(StrEnum):
    """What a grammar's text is written in."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"


class Grammar(StrictModel):
    """What an answer must look like."""

    kind: GrammarKind = Field(description="How `text` is to be read.")
    text: str = Field(
        default="",
        description="A JSON schema, a regular expression, or a JSON list of the choices.",
    )


class GenerateRequest(StrictModel):
    """One sequence to continue."""

    prompt_tokens: tuple[int, ...] = Field(min_length=1, description="Token ids of the prompt.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens to generate; unset: up to the context's end."
    )
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 picks the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Smallest set of this probability.")
    top_k: int | None = Field(default=None, ge=1, description="Only this many likeliest tokens.")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Least probability, as a share of the likeliest's."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken off the logits of tokens generated so far."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, once for each time they were generated."
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=MIN_REPETITION_PENALTY,
        le=MAX_REPETITION_PENALTY,
        description="Divides logits of tokens in prompt or answer.",
    )
    logit_bias: dict[int, float] = Field(
        default={}, description="Added to the logits of these token ids; in [-100, 100]."
    )
    grammar: Grammar | None = Field(default=None, description="What the answer must look like.")
    seed: int | None = Field(
        default=None, description="Makes sampling repeatable: draw i depends on (seed, i) alone."
    )
    stop: tuple[StopString, ...] = Field(
        default=(),
        max_length=MAX_STOP_STRINGS,
        description="Texts that end the sequence; not returned.",
    )
    num_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Alternatives reported a token; unset: none.",
    )
    ignore_eos: bool = Field(
        default=False, description="Go on after an end token (for benchmarks)."
    )
    adapter: str | None = Field(default=None, description="LoRA adapter to run; unset: none.")
    tenant: str = Field(
        default="",
        description="Who asks. Cached prefixes are shared within a tenant only, and tenants get "
        "equal shares of the engine's tokens.",
    )
    resumed_tokens: tuple[int, ...] = Field(
        default=(),
        description="Tokens that another engine generated and delivered already: the answer goes "
        "on after them as if it had never stopped. They count towards `max_tokens`.",
    )


@dataclass(frozen=True)
class Alternative:
    """A token that could have been chosen, with its natural log probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """The chosen token and the likeliest ones at its place, likeliest first."""

    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """What was generated since the last chunk.

    `text` may lag behind `token_ids`: half characters and possible stop strings are held back. The
    last chunk, and only that, has a `finish_reason`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0  # Of the prompt, on the first chunk: read from the cache, not computed.


EAGER = "operator by operator"


@dataclass(frozen=True)
class EngineInfo:
    """What an engine runs and how; `decoding` is how passes of one token a sequence start."""

    engine: str
    vocab_size: int
    max_len: int
    max_slots: int
    weight_bytes: int
    cache_bytes: int
    schemes: Mapping[str, str]
    operators: Mapping[str, str]
    task: Literal["generate", "embed"] = "generate"
    adapters: tuple[str, ...] = ()
    decoding: str = EAGER


@dataclass(frozen=True)
class EngineStats:
    """An engine's load now, and its totals since it started.

    `tokens_in_flight` counts prompt and answer tokens of accepted sequences that are still to be
    computed, with `max_tokens` for the answer. `queue_age_s` is how long the oldest waiting
    sequence has waited. `cached_prompt_tokens` were read from shared blocks, `drafted_tokens` were
    proposed by speculation and `accepted_tokens` of them taken.
    """

    num_running: int
    num_waiting: int
    num_free_slots: int
    prompt_tokens: int
    generated_tokens: int
    num_ticks: int
    tokens_in_flight: int = 0
    queue_age_s: float = 0.0
    num_blocks: int = 0
    num_used_blocks: int = 0
    cached_prompt_tokens: int = 0
    num_preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class EmbeddingEngine(Protocol):
    """Runs one encoder; inputs that arrive together are computed together."""

    def info(self) -> EngineInfo:
        """Return what this engine runs; its task is `embed`."""
        ...

    async def embed(self, inputs: Sequence[tuple[int, ...]], tenant: str = "") -> list[list[float]]:
        """Return a vector of unit length for each input; cancelling the call cancels the work.

        Tenants get equal shares of the engine's tokens. Raises RequestError if an input does not
        fit the model, EngineError if the engine stopped.
        """
        ...

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        ...

    def close(self) -> None:
        """Stop; calls that still run raise EngineError. Calling it again does nothing."""
        ...


class Engine(Protocol):
    """Runs one model that generates."""

    def info(self) -> EngineInfo:
        """Return what this engine runs."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish reason; closing the iterator cancels the work.

        Raises RequestError if the request does not fit the model, EngineError if it stopped.
        """
        ...

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        ...

    def close(self) -> None:
        """Stop; sequences that still run end with EngineError. Calling it again does nothing."""
        ...
