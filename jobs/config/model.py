"""The shape of a model, and which one is trained."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel

Shape = Literal["llama", "qwen2", "qwen3", "mistral"]


class RopeScaling(StrictModel):
    """Scaling of rotary position embeddings beyond the trained context."""

    kind: Literal["linear", "llama3"] = Field(description="How frequencies are scaled.")
    factor: float = Field(gt=0, description="Ratio of new to original context length.")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: below this, scale fully.")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: above this, do not scale.")
    original_max_seq_len: int = Field(8192, gt=0, description="llama3: trained context in tokens.")

    @model_validator(mode="after")
    def _check_frequencies(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )
        return self


class DecoderConfig(StrictModel):
    """Shape of a decoder-only transformer (Llama, Qwen2, Qwen3, Mistral)."""

    shape: Shape = Field("llama", description="Which family's Hugging Face layout is written.")
    vocab_size: int = Field(4096, ge=8, description="Rows of the embedding.")
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(768, ge=8, description="Width of the gated MLP.")
    intermediate_sizes: tuple[int, ...] | None = Field(
        None,
        description="Width of each block's MLP where they differ, as after pruning; "
        "`intermediate_size` is then the largest.",
    )
    num_layers: int = Field(6, ge=1, description="Number of blocks.")
    num_heads: int = Field(4, ge=1, description="Query heads.")
    num_kv_heads: int = Field(2, ge=1, description="Key and value heads.")
    head_dim: int | None = Field(None, ge=2, description="Size of a head; hidden/heads if unset.")
    max_seq_len: int = Field(512, ge=1, description="Largest position, in tokens.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    rope_scaling: RopeScaling | None = Field(None, description="Scaling of rotary positions.")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    tie_embeddings: bool = Field(True, description="Output head shares the embedding.")
    sliding_window: int | None = Field(None, ge=1, description="Attend only this many tokens back.")
    initializer_range: float = Field(0.02, gt=0, description="Std of the initial weights.")
    bos_token_id: int | None = Field(None, ge=0, description="Token that begins a text.")
    eos_token_id: int | None = Field(None, ge=0, description="Token that ends a text.")

    @property
    def resolved_head_dim(self) -> int:
        """Size of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """Width of the MLP of every block."""
        return self.intermediate_sizes or (self.intermediate_size,) * self.num_layers

    def with_mlp_sizes(self, sizes: Sequence[int]) -> Self:
        """Return the shape with as many blocks as there are sizes, of MLPs of these widths."""
        return self.replace(
            num_layers=len(sizes),
            intermediate_size=max(sizes),
            intermediate_sizes=tuple(sizes) if len(set(sizes)) > 1 else None,
        )

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v projections carry a bias (Qwen2)."""
        return self.shape == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether q and k are normalised per head (Qwen3)."""
        return self.shape == "qwen3"

    @model_validator(mode="after")
    def _check_mlp_sizes(self) -> Self:
        sizes = self.intermediate_sizes
        if sizes is None:
            return self
        if len(sizes) != self.num_layers:
            raise ValueError(f"{len(sizes)} intermediate_sizes for num_layers={self.num_layers}")
        if min(sizes) < 8 or max(sizes) != self.intermediate_size:
            raise ValueError(
                f"intermediate_sizes={list(sizes)} must be at least 8 each, the largest "
                f"intermediate_size={self.intermediate_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "set head_dim"
            )
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim={self.resolved_head_dim} must be even for rotary positions")
        return self


class ModelConfig(StrictModel):
    """Which model is trained: a fresh one of a shape, or weights from a directory."""

    family: str = Field("decoder", description="Plug-in in jobs/models.")
    init_from: str | None = Field(None, description="Hugging Face directory to start from.")
    decoder: DecoderConfig = Field(DecoderConfig(), description="Shape of a fresh decoder.")
