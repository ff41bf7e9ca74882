"""Options of the native engine, as values. No I/O, no torch."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel
from serving.engines._options import TorchOptions


class DrafterKind(StrEnum):
    """Who proposes tokens that the model then checks many of at a time."""

    NONE = "none"
    NGRAM = "ngram"
    DRAFT = "draft"


class SpeculationConfig(StrictModel):
    """Speculative decoding; answers stay what they are without it."""

    kind: DrafterKind = Field(
        default=DrafterKind.NONE,
        description="ngram: what followed the same words earlier in the text; draft: a small model "
        "of the same tokenizer.",
    )
    num_tokens: int = Field(
        default=6, ge=1, le=32, description="Most tokens proposed for a sequence in a pass."
    )
    max_rows: int = Field(
        default=16,
        ge=2,
        description="Nothing is proposed beyond this many tokens of a pass, because the model then "
        "computes at its limit and a wrong guess costs as much as a right one gains.",
    )
    draft: str | None = Field(default=None, description="Directory of the small model.")

    @model_validator(mode="after")
    def _check_draft(self) -> Self:
        if (self.kind is DrafterKind.DRAFT) != (self.draft is not None):
            raise ValueError("`draft` names a directory if and only if `kind` is draft")
        return self


class EngineConfig(TorchOptions):
    """How much the native engine runs at a time, and in which precision."""

    max_shared_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Tokens of a pass for tenants that have more than twice the sequences of the "
        "lightest, beyond as many as that has. Lower: the lightest is slowed less, and fewer "
        "tokens a second are computed in all. auto: the most, up to 8, that make a pass at most a "
        "quarter longer, measured at the start. null: no bound.",
    )
    block_size: int = Field(default=16, ge=1, le=512, description="Tokens of one cache block.")
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="Type of cached keys and values, int8 with a scale for each token and head. "
        "auto: int8 if the model's directory says so (a recipe's `kv_cache`), else that of "
        "activations.",
    )
    enable_prefix_cache: bool = Field(
        default=True, description="Keep what was computed for a later prompt that begins alike."
    )
    speculation: SpeculationConfig = SpeculationConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Type of activations; auto: float32 on CPU, bfloat16 on CUDA, and for encoders "
        "bfloat16 wherever it is fast.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="On CUDA: record passes of one token a sequence, once for each size, and "
        "replay them. Passes with prompts, guesses or adapters start operator by operator.",
    )
