"""What every inference engine offers: token ids in, text and token ids out, piece by piece.

Takes and gives values only. It does not know about HTTP, prompts as text, or how an engine works.
Each plug-in package in this folder has `create(directory, options) -> Engine`.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Protocol

from pydantic import Field

from cluster.config import StrictModel

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class FinishReason(StrEnum):
    """Why a sequence ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"


class GenerateRequest(StrictModel):
    """One sequence to continue."""

    prompt_tokens: tuple[int, ...] = Field(min_length=1, description="Token ids of the prompt.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens to generate; unset: up to the context's end."
    )
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 picks the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Smallest set of this probability.")
    top_k: int | None = Field(default=None, ge=1, description="Only this many likeliest tokens.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
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


@dataclass(frozen=True)
class EngineInfo:
    """What an engine runs and how."""

    engine: str
    vocab_size: int
    max_len: int
    max_slots: int
    weight_bytes: int
    cache_bytes: int
    schemes: Mapping[str, str]
    operators: Mapping[str, str]


@dataclass(frozen=True)
class EngineStats:
    """An engine's load now, and its totals since it started."""

    num_running: int
    num_waiting: int
    num_free_slots: int
    prompt_tokens: int
    generated_tokens: int
    num_ticks: int


class Engine(Protocol):
    """Runs one model."""

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
