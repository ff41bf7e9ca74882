"""Options of the vLLM engine, as values. No I/O, no torch, no vLLM."""

from typing import Literal

from pydantic import Field

from serving.engines._options import EngineOptions


class VllmConfig(EngineOptions):
    """How much vLLM runs at a time, and in which precision."""

    max_slots: int = Field(default=64, ge=1, le=4096, description="Sequences that run at a time.")
    max_batch_tokens: int = Field(default=2048, ge=1, description="Tokens of one pass.")
    cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory for keys and values; unset: on a CPU enough for `max_slots` sequences "
        "of `max_len` tokens, at most half of what is free, and on a GPU as vLLM decides.",
    )
    enable_prefix_cache: bool = Field(
        default=True, description="Keep what was computed for a later prompt that begins alike."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Type of activations and cache; auto: bfloat16."
    )
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share the model.")
    enforce_eager: bool = Field(
        default=False, description="Start at once and run slower: nothing is compiled."
    )
