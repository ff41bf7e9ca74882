"""A decoder for inference on CPUs with the C++ kernels: the same results by fewer, larger steps.

Takes a loaded `Decoder`; computes what it computes, in float32 activations, with products that read
the same rows joined and everything between products in C++. It does not know about sequences, and
it does not train.

A row's result does not depend on the other rows of a pass, to the last bit, as long as the layers'
operators promise it too.

T tokens of the pass (B = 1), P positions, C hidden width, F width of the gated MLP, O outputs of q,
k and v
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from jobs.config import DecoderConfig
from jobs.kernels import native, native_ops
from jobs.kernels.attention import Attention
from jobs.kernels.block_cache import PagedAttention
from jobs.kernels.decoder_pass import (
    DecoderPass,
    DecoderWeights,
    LayerWeights,
    Linear,
    Space,
    is_compiled,
)
from jobs.kernels.linear import DenseLinear, QuantizedLinear, fuse
from jobs.kernels.memory import give_back
from jobs.kernels.rows import QuantizedRows, quantize
from jobs.models._rotary import Rotary, rotate
from jobs.models.decoder import Block, Decoder, RMSNorm, RowAdapters

_MIN_ROWS = 64
_POSITIONS = 4096  # by which tables of angles grow
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_LINEARS = (*_ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")


def can_fuse(model: Decoder) -> bool:
    """Return whether a model can become a FusedDecoder on this machine.

    It must be on CPU with layers for inference and float32 activations, as load_model returns it,
    and the C++ kernels must be available.
    """
    parts = [part for block in model.model.layers for part in (block.self_attn, block.mlp)]
    layers = [getattr(part, name) for part in parts for name in _LINEARS if hasattr(part, name)]
    is_packed = all(
        isinstance(layer, DenseLinear | QuantizedLinear)
        and layer.problem.dtype == torch.float32
        and layer.problem.device.type == "cpu"
        for layer in layers
    )
    return is_packed and native.is_available()


class FusedDecoder:
    """The forward pass of a `Decoder`, whose weights it shares.

    Where every layer runs on an operator of our own a pass is one call; else, and where rows have
    adapters, it is a call a step, with the same results. One pass at a time: work space is kept.
    """

    def __init__(self, model: Decoder) -> None:
        """Take a model for which `can_fuse` holds; it goes on working, on the same weights."""
        assert can_fuse(model), "the model or this machine does not allow it"
        self.config = model.config
        self._embedding_VC = model.model.embed_tokens.weight.detach()
        assert self._embedding_VC.dtype in (torch.float32, torch.bfloat16), "float16 is not read"
        self._angles = _Angles(model.rotary)
        self._layers = [_Layer(cast(Block, block), self.config) for block in model.model.layers]
        self._norm_C = _weight(model.model.norm)
        self._head = model.lm_head
        self._space = _Space(self.config)
        self._whole_pass = self._compile()
        give_back()  # What the layers apart occupied.

    @property
    def is_one_call(self) -> bool:
        """Whether a pass without adapters over a paged cache is one call."""
        return self._whole_pass is not None

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attention: Attention,
        adapters: RowAdapters | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """Return float32 h_BTC after the final norm, for B = 1, or h_BNC of some tokens.

        `wanted_N` must rise: int64 places of tokens in the pass.
        """
        batch, num_tokens = tokens_BT.shape
        assert batch == 1, f"one row of tokens is computed at a time, not {batch}"
        tokens_T = tokens_BT[0].contiguous()
        ids = tokens_T.numpy()  # torch would wake its threads for a minimum.
        assert ids.min() >= 0, "token ids must not be negative"
        assert ids.max() < self.config.vocab_size, "a token id is beyond the vocabulary"
        space = self._space.of(num_tokens)
        mix = _Mix(attention, self._angles.of(positions_BT[0]), self.config)
        if self._whole_pass and adapters is None and isinstance(attention, PagedAttention):
            wanted_N = torch.arange(num_tokens) if wanted_N is None else wanted_N
            return self._whole_pass.run(tokens_T, attention, space, wanted_N)[None]
        native_ops.embed(self._embedding_VC, tokens_T, space.h)
        for layer in self._layers:
            layer.run(space, mix, adapters)
        h_NC = space.h if wanted_N is None else space.h[wanted_N]
        out_NC = torch.empty_like(h_NC)
        native_ops.rms_norm(h_NC, self._norm_C, out_NC, self.config.norm_eps)
        return out_NC[None]

    def head(self, h: Tensor) -> Tensor:
        """Return float32 logits [..., V] of final hidden states [..., C]."""
        logits: Tensor = self._head(h)
        return logits.float()

    def _compile(self) -> DecoderPass | None:
        """Return the whole pass as one call, if every layer can be part of it."""
        if not all(is_compiled(part) for layer in self._layers for part in layer.linears()):
            return None
        return DecoderPass(
            DecoderWeights(
                self._embedding_VC,
                self._norm_C,
                [layer.weights() for layer in self._layers],
                self.config.intermediate_size,
                self.config.norm_eps,
            )
        )


class _Space:
    """Memory of passes, kept from one to the next."""

    def __init__(self, config: DecoderConfig) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        query = config.num_heads * config.resolved_head_dim
        key = config.num_kv_heads * config.resolved_head_dim
        self._widths = (hidden, hidden, query + 2 * key, query, 2 * inner)
        self._widest_input = max(hidden, query, inner)
        self._grow(_MIN_ROWS)

    def of(self, num_tokens: int) -> Space:
        """Return memory for so many rows."""
        if num_tokens > self._num_rows:
            self._grow(1 << (num_tokens - 1).bit_length())
        h, x, qkv, o, gate_up = (whole[:num_tokens] for whole in self._floats)
        return Space(h, x, qkv, o, gate_up, self._quantized)

    def _grow(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._floats = [torch.empty((num_rows, width)) for width in self._widths]
        self._quantized = QuantizedRows.empty(num_rows, self._widest_input)


class _Angles:
    """Cosines and sines of positions, kept from the first use; the tables grow by blocks."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary
        self._tables_PD = self._compute(0, _POSITIONS)

    def of(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, D / 2] of some positions."""
        places = positions_T.numpy()
        assert places.min() >= 0, "positions must not be negative"
        known, wanted = len(self._tables_PD[0]), int(places.max()) + 1
        if wanted > known:
            more_PD = self._compute(known, -(-wanted // _POSITIONS) * _POSITIONS)
            cos_PD, sin_PD = map(torch.cat, zip(self._tables_PD, more_PD, strict=True))
            self._tables_PD = (cos_PD, sin_PD)
        cos_PD, sin_PD = self._tables_PD
        return cos_PD[positions_T], sin_PD[positions_T]

    def _compute(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        cos_BP1D, sin_BP1D = self._rotary(torch.arange(start, stop)[None], torch.float32)
        return cos_BP1D[0, :, 0], sin_BP1D[0, :, 0]


class _Mix:
    """How the layers of one pass attend."""

    def __init__(
        self, attention: Attention, rotation: tuple[Tensor, Tensor], config: DecoderConfig
    ) -> None:
        self._attention = attention
        self._rotation = rotation
        self._config = config
        if isinstance(attention, PagedAttention):
            attention.rotate_by(*rotation)

    def __call__(self, layer: "_Layer", qkv_TO: Tensor, out_TC: Tensor) -> None:
        """Write what every token attends to, given its raw q, k and v side by side."""
        config = self._config
        if isinstance(self._attention, PagedAttention):
            norms = (layer.q_norm, layer.k_norm)
            self._attention.attend_rows(layer.number, qkv_TO, out_TC, norms, config.norm_eps)
            return
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        sizes = [count * config.resolved_head_dim for count in heads]
        q, k, v = (
            part.unflatten(1, (count, -1))
            for part, count in zip(qkv_TO.split(sizes, dim=1), heads, strict=True)
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _norm_heads(q, layer.q_norm, config), _norm_heads(k, layer.k_norm, config)
        q, k = (rotate(x, *(angles_TD[:, None] for angles_TD in self._rotation)) for x in (q, k))
        o_BTHD = self._attention(layer.number, q[None], k[None], v[None])
        out_TC.copy_(o_BTHD[0].flatten(1))


class _Layer:
    """One block's weights in the form that a pass reads."""

    def __init__(self, block: Block, config: DecoderConfig) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.number: int = attention.layer
        self._eps = config.norm_eps
        self._width = config.mlp_sizes[self.number]
        self._norms = (_weight(block.input_layernorm), _weight(block.post_attention_layernorm))
        self.q_norm = None if attention.q_norm is None else _weight(attention.q_norm)
        self.k_norm = None if attention.k_norm is None else _weight(attention.k_norm)
        prefix = f"model.layers.{self.number}"
        self._qkv = _Joined(attention, f"{prefix}.self_attn", _ATTENTION)
        self._o = _Joined(attention, f"{prefix}.self_attn", ("o_proj",))
        self._gate_up = _Joined(mlp, f"{prefix}.mlp", ("gate_proj", "up_proj"))
        self._down = _Joined(mlp, f"{prefix}.mlp", ("down_proj",))

    def linears(self) -> Sequence[Linear]:
        """Return all linear layers."""
        return [*self._qkv.parts, *self._o.parts, *self._gate_up.parts, *self._down.parts]

    def weights(self) -> LayerWeights:
        """Return the weights as a whole pass reads them."""
        return LayerWeights(
            norms=self._norms,
            head_norms=(self.q_norm, self.k_norm),
            qkv=self._qkv.parts,
            o=self._o.parts[0],
            gate_up=self._gate_up.parts,
            down=self._down.parts[0],
        )

    def run(self, space: Space, mix: _Mix, adapters: RowAdapters | None) -> None:
        """Advance the residual stream h of a pass by this layer."""
        native_ops.rms_norm(space.h, self._norms[0], space.x, self._eps)
        self._qkv.write(space.x, space, space.qkv, adapters)
        mix(self, space.qkv, space.o)
        self._o.write(space.o, space, space.x, adapters)
        space.h.add_(space.x)
        native_ops.rms_norm(space.h, self._norms[1], space.x, self._eps)
        gate_up_TF = space.gate_up[:, : 2 * self._width]
        self._gate_up.write(space.x, space, gate_up_TF, adapters)
        product_TF = gate_up_TF[:, : self._width]
        native_ops.silu_mul(gate_up_TF, product_TF)
        self._down.write(product_TF, space, space.x, adapters)
        space.h.add_(space.x)


class _Joined:
    """Linear layers that read the same rows; their outputs lie side by side."""

    def __init__(self, module: nn.Module, prefix: str, names: Sequence[str]) -> None:
        """Join layers of a module, if they can be joined."""
        layers = [cast(Linear, getattr(module, name)) for name in names]
        self._names = [f"{prefix}.{name}" for name in names]
        self._widths = [layer.out_features for layer in layers]
        joined = fuse(layers) if len(layers) > 1 else None
        self.parts: Sequence[Linear] = layers if joined is None else [joined]

    def write(self, x_TI: Tensor, space: Space, y_TO: Tensor, adapters: RowAdapters | None) -> None:
        """Write the layers' outputs for rows x."""
        quantized: QuantizedRows | None = None
        if any(part.takes_int8 for part in self.parts):
            quantized = quantize(x_TI, space.quantized_rows(x_TI.shape[1]))
        outputs = y_TO.split([part.out_features for part in self.parts], dim=1)
        for part, part_TO in zip(self.parts, outputs, strict=True):
            rows = quantized if part.takes_int8 and quantized is not None else x_TI
            part.multiply_into(rows, part_TO)
        if adapters is not None:
            for name, part_TO in zip(self._names, y_TO.split(self._widths, dim=1), strict=True):
                adapters.add(name, x_TI, part_TO)


def _norm_heads(x_THD: Tensor, weight_D: Tensor, config: DecoderConfig) -> Tensor:
    x_ND = x_THD.flatten(0, 1).contiguous()
    out_ND = torch.empty_like(x_ND)
    native_ops.rms_norm(x_ND, weight_D, out_ND, config.norm_eps)
    return out_ND.view(x_THD.shape)


def _weight(norm: nn.Module) -> Tensor:
    return cast(RMSNorm, norm).weight.detach().float().contiguous()
