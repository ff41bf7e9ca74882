"""A decoder's whole forward pass as one call of the C++ kernels.

Takes a decoder's weights, in layers that run on operators of csrc/, and the work space of a pass;
gives a function from tokens to hidden states. It does not know how a model is loaded, nor about
layers on other operators or adapters (see jobs/models/_fused.py).

T tokens of the pass, N of them wanted, C hidden width
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.kernels import native
from jobs.kernels.block_cache import PagedAttention
from jobs.kernels.formats import Scheme
from jobs.kernels.linear import DenseLinear, QuantizedLinear
from jobs.kernels.rows import QuantizedRows, padded_inputs

Linear = DenseLinear | QuantizedLinear
_SCHEMES: dict[Scheme, int] = {"bf16": 0, "w8a8": 1, "w4a16": 2, "w4a8": 3, "w8a16": 4}
_MAX_JOINED = 3
_SUM_BLOCK = 32
_decoder_pass = native.function("rs_decoder_pass", "ppppppnpi")


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms' weights in float32, and linear layers that read the same rows together."""

    norms: tuple[Tensor, Tensor]  # before attention, before the gated MLP
    head_norms: tuple[Tensor | None, Tensor | None]  # of queries, of keys
    qkv: Sequence[Linear]
    o: Linear
    gate_up: Sequence[Linear]
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder's weights; the embedding is float32 or bfloat16."""

    embedding_VC: Tensor  # noqa: N815
    norm_C: Tensor  # noqa: N815
    layers: Sequence[LayerWeights]
    intermediate_size: int  # of the widest layer; each layer's own is that of its weights
    eps: float


@dataclass(frozen=True)
class Space:
    """Memory of a pass: rows of the residual stream, and of what layers read and write."""

    h: Tensor
    x: Tensor
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    quantized: QuantizedRows  # at least as many rows of any width

    def quantized_rows(self, inputs: int) -> QuantizedRows:
        """Return memory for the pass's rows of so many inputs in int8; there is one at a time."""
        num_rows, padded = self.h.shape[0], padded_inputs(inputs)
        blocks = padded // _SUM_BLOCK
        return QuantizedRows(
            self.quantized.values_NS.view(-1)[: num_rows * padded].view(num_rows, padded),
            self.quantized.scale_N[:num_rows],
            self.quantized.sums_NB.view(-1)[: num_rows * blocks].view(num_rows, blocks),
        )


def is_compiled(layer: Linear) -> bool:
    """Return whether a layer runs on an operator of csrc/, on float32 rows."""
    return layer.source.in_place is not None and layer.problem.dtype == torch.float32


class DecoderPass:
    """The forward pass of one decoder."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Describe the weights, which are kept; every linear layer must be `is_compiled`."""
        self._weights = weights
        layers = [_layer(layer) for layer in weights.layers]
        self._layers = (_LayerFields * len(layers))(*layers)
        self._fields = _DecoderFields(
            ctypes.addressof(self._layers),
            len(layers),
            weights.embedding_VC.data_ptr(),
            int(weights.embedding_VC.dtype == torch.bfloat16),
            weights.norm_C.data_ptr(),
            weights.norm_C.shape[0],
            weights.intermediate_size,
            weights.eps,
        )

    def run(
        self, tokens_T: Tensor, attention: PagedAttention, space: Space, wanted_N: Tensor
    ) -> Tensor:
        """Return h_NC after the final norm, of wanted tokens; their places in the pass rise.

        `attention` knows the rotation already. Keys and values of all tokens are written, and
        nothing is computed that only the last outputs of unwanted tokens would need.
        """
        places = wanted_N.numpy()
        assert (places[1:] > places[:-1]).all(), f"places must rise: {places}"
        is_inside = not len(places) or 0 <= places[0] <= places[-1] < len(tokens_T)
        assert is_inside, f"places are beyond the pass's {len(tokens_T)} tokens: {places}"
        out_NC = torch.empty((len(wanted_N), self._weights.norm_C.shape[0]))
        floats = (space.h, space.x, space.qkv, space.o, space.gate_up)
        quantized = space.quantized
        tensors = (*floats, quantized.values_NS, quantized.scale_N, quantized.sums_NB)
        fields = _SpaceFields(*(x.data_ptr() for x in tensors))
        pool, step = attention.addresses()
        _decoder_pass(
            ctypes.addressof(self._fields),
            pool,
            step,
            ctypes.addressof(fields),
            tokens_T.data_ptr(),
            wanted_N.data_ptr(),
            len(wanted_N),
            out_NC.data_ptr(),
            native.num_threads(),
        )
        return out_NC


# The structures of csrc/decoder.cpp.


class _LinearFields(ctypes.Structure):
    _fields_ = (
        ("scheme", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


class _JoinedFields(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int64), ("parts", _LinearFields * _MAX_JOINED))


class _LayerFields(ctypes.Structure):
    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", _JoinedFields),
        ("o", _JoinedFields),
        ("gate_up", _JoinedFields),
        ("down", _JoinedFields),
    )


class _DecoderFields(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("embedding", ctypes.c_void_p),
        ("is_embedding_half", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
        ("eps", ctypes.c_double),
    )


class _SpaceFields(ctypes.Structure):
    _fields_ = (
        ("h", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


def _layer(weights: LayerWeights) -> _LayerFields:
    norms = (*weights.norms, *weights.head_norms)
    joined = (weights.qkv, (weights.o,), weights.gate_up, (weights.down,))
    return _LayerFields(*map(native.address, norms), *map(_joined, joined))


def _joined(layers: Sequence[Linear]) -> _JoinedFields:
    return _JoinedFields(len(layers), (_LinearFields * _MAX_JOINED)(*map(_linear, layers)))


def _linear(layer: Linear) -> _LinearFields:
    assert is_compiled(layer), f"operator {layer.operator} is none of csrc/"
    packed, *scales = layer.packed
    return _LinearFields(
        _SCHEMES[layer.scheme],
        packed.data_ptr(),
        native.address(scales[0] if scales else None),
        native.address(layer.bias),
        layer.in_features,
        layer.out_features,
        layer.problem.layout.group_size or 0,
    )
