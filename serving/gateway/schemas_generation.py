"""What completion and chat requests share: the model, sampling, structure, streaming.

Takes JSON; gives a `Sampling`. It does not know prompts.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from serving.engines._protocol import (
    MAX_REPETITION_PENALTY,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    StopString,
)
from serving.gateway.limits import MAX_TIMEOUT_S
from serving.gateway.schemas_base import IGNORED, MAX_TOKENS, Body, ModelName
from serving.gateway.schemas_structure import Structured
from serving.messages import Sampling, Structure

MAX_N = 8
MAX_SEED = 2**63 - 1
MAX_BIASES = 1024

Stops = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = Field(default=False, description="End with a chunk of token counts.")
    include_obfuscation: Literal[False] = Field(default=False, description="Not supported.")


class Generation(Structured):
    """What both kinds of request share."""

    _ignored: ClassVar[frozenset[str]] = IGNORED
    _neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: ModelName = Field(description="Id of a served model; `name@version` for one version.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: no randomness.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(
        default=None, ge=1, le=2**31, description="Only the k likeliest tokens (an extension)."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Least share of the likeliest's probability (too)."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Against tokens that were generated."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="The same, for each time."
    )
    repetition_penalty: float | None = Field(
        default=None,
        ge=MIN_REPETITION_PENALTY,
        le=MAX_REPETITION_PENALTY,
        description="Against tokens of prompt and answer (extension).",
    )
    logit_bias: dict[BiasedToken, Bias] | None = Field(
        default=None, max_length=MAX_BIASES, description="Added to logits, by token id."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_N, description="Choices for each prompt.")
    seed: int | None = Field(
        default=None, ge=-MAX_SEED, le=MAX_SEED, description="Makes sampling repeatable."
    )
    stop: StopString | Stops | None = Field(default=None, description="Texts that end a choice.")
    stream: bool | None = Field(default=None, description="Send the answer as it is made.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Most tokens to generate."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Go on after an end token (an extension, for benchmarks)."
    )
    adapter: ModelName | None = Field(
        default=None, description="LoRA adapter of the model to run (an extension)."
    )
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT_S,
        description="Give up after this time, in seconds (an extension).",
    )
    return_token_ids: bool | None = Field(
        default=None, description="Add `token_ids` to every choice (an extension)."
    )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is only allowed with `stream` = true")
        return self

    def _sampling(
        self, max_tokens: int | None, num_logprobs: int | None, structure: Structure | None
    ) -> Sampling:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        return Sampling(
            max_tokens=max_tokens,
            top_k=self.top_k,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            structure=structure,
            seed=self.seed,
            stop=tuple(stops),
            num_logprobs=num_logprobs,
            ignore_eos=bool(self.ignore_eos),
            **{name: float(value) for name, value in given.items() if value is not None},
        )
