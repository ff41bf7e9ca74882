"""Decoder-only transformers: Llama, Qwen2, Qwen3 and Mistral shapes in one implementation.

Takes token ids; gives logits. Modules and parameters carry Hugging Face names, and logits equal
transformers' to float32 rounding. It does not know how it is trained, sampled from or compressed:
attention is handed in, and any linear layer may be replaced by one of another format.

B batch, T tokens, H query heads, K key/value heads, D size of a head, C hidden width, V vocabulary
"""

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.errors import ModelFormatError
from cluster.storage import GIB
from jobs.config import DecoderConfig
from jobs.kernels.attention import Attention, attend_causal
from jobs.models import _hf, _weights
from jobs.models._hf import stop_token_ids
from jobs.models._rotary import Rotary, rotate

__all__ = [
    "Block",
    "Decoder",
    "RMSNorm",
    "RowAdapters",
    "build",
    "linear_names",
    "load",
    "save",
    "stop_token_ids",
]


class RowAdapters(Protocol):
    """Low-rank parts that some rows of a pass add to what linear layers give."""

    def add(self, layer_name: str, x_TC: Tensor, y_TO: Tensor) -> None:
        """Add to the output of the layer of this name, in place, what its input makes of it.

        Rows of both may lie any stride apart.
        """
        ...


class Decoder(nn.Module):
    """A language model whose module tree is that of transformers' `...ForCausalLM` classes."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.tie()

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attention: Attention | None = None,
    ) -> Tensor:
        """Return logits_BTV in float32.

        Positions count from 0 unless given; attention is causal over whole sequences unless given.
        """
        return self.head(self.hidden(tokens_BT, positions_BT, attention))

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attention: Attention | None = None,
        adapters: RowAdapters | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """Return h_BTC after the final norm, for a caller that needs logits of few tokens.

        With `adapters` every linear layer's output is handed to them, rows of all B together. With
        `wanted_N`, only those tokens' h_BNC.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        h_BTC = self.model.embed_tokens(tokens_BT)
        cos_BT1D, sin_BT1D = self.rotary(positions_BT, h_BTC.dtype)
        for block in self.model.layers:
            h_BTC = block(h_BTC, cos_BT1D, sin_BT1D, attention, adapters)
        return self.model.norm(h_BTC if wanted_N is None else h_BTC[:, wanted_N])

    def head(self, h: Tensor) -> Tensor:
        """Return float32 logits [..., V] of final hidden states [..., C]."""
        return self.lm_head(h).float()

    def tie(self) -> None:
        """Make the head share the embedding's weight, where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def untie(self) -> None:
        """Give the head a copy of the embedding's weight as its own, if they share it."""
        if self.config.tie_embeddings:
            self.config = self.config.replace(tie_embeddings=False)
            weight_VC = self.model.embed_tokens.weight
            self.lm_head.weight = nn.Parameter(
                weight_VC.detach().clone(), requires_grad=weight_VC.requires_grad
            )


class Block(nn.Module):
    """One layer: attention and a gated MLP, each normalised before and added to the residual.

    Compiling each block compiles one graph for all whose MLPs are of one width: nothing else that
    is read on the way without a given `attention` differs between layers.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config, layer)
        self.mlp = _GatedMLP(config, layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        h_BTC: Tensor,
        cos_BT1D: Tensor,
        sin_BT1D: Tensor,
        attention: Attention | None = None,
        adapters: RowAdapters | None = None,
    ) -> Tensor:
        """Return the residual stream h_BTC after this layer."""
        x_BTC = self.input_layernorm(h_BTC)
        h_BTC = h_BTC + self.self_attn(x_BTC, cos_BT1D, sin_BT1D, attention, adapters)
        return h_BTC + self.mlp(self.post_attention_layernorm(h_BTC), adapters)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., size] scaled to unit mean square and by the weight, in x's dtype."""
        normal = functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normal.to(x.dtype)


class _Backbone(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class _Part(nn.Module):
    """A part of a block, known to adapters by its place in the module tree."""

    name: str

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def project(self, name: str, x_BTC: Tensor, adapters: RowAdapters | None) -> Tensor:
        """Return what the linear layer of this name gives, with what adapters add."""
        y_BTO: Tensor = getattr(self, name)(x_BTC)
        if adapters is not None:
            layer_name = f"model.layers.{self.layer}.{self.name}.{name}"
            adapters.add(layer_name, x_BTC.flatten(0, 1), y_BTO.flatten(0, 1))
        return y_BTO


class _SelfAttention(_Part):
    name = "self_attn"

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(layer)
        self.head_dim = config.resolved_head_dim
        self.window = config.sliding_window
        query_size = config.num_heads * self.head_dim
        key_size = config.num_kv_heads * self.head_dim
        bias = config.has_qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(
        self,
        x_BTC: Tensor,
        cos_BT1D: Tensor,
        sin_BT1D: Tensor,
        attention: Attention | None,
        adapters: RowAdapters | None,
    ) -> Tensor:
        q_BTHD, k_BTKD, v_BTKD = (
            self.project(name, x_BTC, adapters).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        # Rotating promotes to float32 under autocast, which gives the values as bfloat16.
        q_BTHD = rotate(q_BTHD, cos_BT1D, sin_BT1D).to(v_BTKD.dtype)
        k_BTKD = rotate(k_BTKD, cos_BT1D, sin_BT1D).to(v_BTKD.dtype)
        if attention is None:
            o_BTHD = attend_causal(q_BTHD, k_BTKD, v_BTKD, self.window)
        else:
            o_BTHD = attention(self.layer, q_BTHD, k_BTKD, v_BTKD)
        return self.project("o_proj", o_BTHD.flatten(-2), adapters)


class _GatedMLP(_Part):
    name = "mlp"

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(layer)
        width = config.mlp_sizes[layer]
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, adapters: RowAdapters | None) -> Tensor:
        gate_BTF = self.project("gate_proj", x_BTC, adapters)
        product_BTF = functional.silu(gate_BTF) * self.project("up_proj", x_BTC, adapters)
        return self.project("down_proj", product_BTF, adapters)


def build(config: DecoderConfig, seed: int) -> Decoder:
    """Return a decoder with fresh weights that depend on `config` and `seed` alone.

    Normal with `initializer_range`; layers that write to the residual stream are scaled down by
    the square root of their number (GPT-2, Radford et al. 2019); norms are 1, biases 0.
    Raises ModelFormatError if the shape's family cannot express the config.
    """
    _hf.to_hf_config(config)  # What could not be saved is refused before it is trained.
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    model.tie()
    generator = torch.Generator().manual_seed(seed)
    residual_std = config.initializer_range / math.sqrt(2 * config.num_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if is_residual else config.initializer_range
                parameter.normal_(0.0, std, generator=generator)
    return model


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Read a dense Hugging Face directory, sharded or not, with weights cast to `dtype`.

    Raises ModelFormatError for an architecture or option that is not supported, a quantized model,
    and for tensors that are missing, unknown or of the wrong shape.
    """
    document = _hf.read_config(directory)
    if "quantization_config" in document:
        raise ModelFormatError(
            f"{directory} holds a quantized model (quantization_config in {_hf.CONFIG}); dense "
            "weights are needed here. Give the model that it was made from."
        )
    config = _hf.from_hf_config(document)
    with torch.device("meta"):
        model = Decoder(config)
    state = {name: tensor.to(dtype) for name, tensor in _weights.read_tensors(directory)}
    if config.tie_embeddings:
        _join_tied_head(state, directory)
    _weights.check_tensors(
        state, {name: t.shape for name, t in model.state_dict().items()}, directory
    )
    model.load_state_dict(state, assign=True)
    model.tie()
    return model


def save(
    model: Decoder,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * GIB,
) -> None:
    """Write a dense Hugging Face directory: config, generation config, safetensors in `dtype`.

    Shards and an index appear when the weights exceed `max_shard_bytes`. Neither tokenizer nor
    manifest is written. Raises ModelFormatError if the shape's family cannot express the config.
    """
    document = _hf.to_hf_config(model.config)
    document["dtype"] = str(dtype).removeprefix("torch.")
    tensors = {
        name: tensor.detach().to("cpu", dtype)
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_embeddings and name == "lm_head.weight")
    }
    _weights.write_tensors(tensors, directory, max_shard_bytes)
    _hf.write_config(document, directory)


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all `nn.Linear` within the blocks (not the head), in order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    ]


def _join_tied_head(state: dict[str, Tensor], directory: Path) -> None:
    embedding_VC = state.get("model.embed_tokens.weight")
    head_VC = state.get("lm_head.weight", embedding_VC)
    if embedding_VC is None or head_VC is None:
        return
    if not torch.equal(embedding_VC, head_VC):
        raise ModelFormatError(
            f"{directory}: tie_word_embeddings is true, and lm_head.weight differs from the "
            "embedding. Set it to false in config.json to keep both."
        )
    state["lm_head.weight"] = embedding_VC
