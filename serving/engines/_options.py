"""Options that engines share, where they mean the same. No I/O, no torch."""

from typing import Literal

from pydantic import Field

from cluster.config import StrictModel


class EngineOptions(StrictModel):
    """What every engine can be told."""

    max_len: int = Field(
        default=4096,
        ge=2,
        description="Tokens of one sequence, prompt included; the model's limit holds too.",
    )
    max_slots: int = Field(default=16, ge=1, le=1024, description="Sequences that run at a time.")
    cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Memory for keys and values; unset: enough for `max_slots` sequences of "
        "`max_len` tokens, at most half of what is free.",
    )
    adapters: dict[str, str] = Field(
        default={}, description="LoRA adapters by name: PEFT directories."
    )


class TorchOptions(EngineOptions):
    """What an engine can be told whose passes are ours, computed by torch in this process."""

    max_batch_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens of one pass: one a running sequence, the rest new prompts.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Type of activations; auto: float32 on CPU, bfloat16 on CUDA."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA if there is one."
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="Threads of one operator on CPU; unset: as torch decides."
    )
