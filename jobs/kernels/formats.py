"""Formats of a linear layer's weight (dense, W8A8, FP8, W8A16, W4A16, W4A8, W3A16), and arithmetic.

Takes dense weights and scales; gives quantized weights, their sizes, and the plain reference of
what a layer of each format computes. It does not know how weights are chosen, stored on disk or
laid out for an operator.

O output features, I input features, G groups of inputs that share a scale, N rows
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from jobs.config import Scheme as Scheme  # the name that layers and loaders import

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
# Weights with a scale per group of inputs, or per output: bits of a weight on disk.
PACKED_BITS: dict[Scheme, int] = {"w8a16": 8, "w4a16": 4, "w4a8": 4, "w3a16": 3}
GROUPED: tuple[Scheme, ...] = tuple(PACKED_BITS)
# One byte a weight, and a scale per output: the type on disk and in memory.
CHANNELED: dict[Scheme, torch.dtype] = {"w8a8": torch.int8, "fp8": torch.float8_e4m3fn}
DEFAULT_GROUP_SIZE = 128
_COMPUTED_GROUPS = (128, 64, 32)
FP8_MAX = 448  # largest value of float8_e4m3fn
REFERENCE_BLOCK = 256
_WORD_BITS = 32
_WORD_MASK = 2**32 - 1


@dataclass(frozen=True)
class Layout:
    """How one layer's weight is stored: its scheme and inputs per scale; None: all of an output."""

    scheme: Scheme
    group_size: int | None = None

    def __post_init__(self) -> None:
        assert self.group_size is None or self.scheme in GROUPED, f"bad layout {self}"

    def num_groups(self, in_features: int) -> int:
        """Return how many scales one output row has."""
        return 1 if self.group_size is None else in_features // self.group_size

    def computable(self) -> "Layout":
        """Return the format that operators compute: int3 as int4."""
        return replace(self, scheme="w4a16") if self.scheme == "w3a16" else self

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Return the bytes of a layer's weight tensors on disk, scales and shape included."""
        num_weights = out_features * in_features
        scale_bytes = 2 * out_features * self.num_groups(in_features)
        if self.scheme == "bf16":
            return 2 * num_weights
        if self.scheme in CHANNELED:
            return num_weights + scale_bytes
        words = num_words(in_features, PACKED_BITS[self.scheme])
        return 4 * out_features * words + scale_bytes + 2 * 8


@dataclass(frozen=True)
class QuantizedWeight:
    """Symmetric weights of few bits with their scales: `values_OI * scale_OG` is the weight.

    `values_OI` is float8_e4m3fn for fp8, else int8: in [-128, 127] for w8a8 and w8a16,
    [-8, 7] for int4 and [-4, 3] for int3 (one value a byte here). `scale_OG` is float32 holding
    bfloat16 values, G = 1 for fp8 and w8a8.
    """

    scheme: Scheme
    values_OI: Tensor  # noqa: N815
    scale_OG: Tensor  # noqa: N815
    group_size: int | None

    def __post_init__(self) -> None:
        rows, columns = self.values_OI.shape
        groups = self.layout.num_groups(columns)
        assert self.scheme != "bf16", "a dense weight is a plain tensor"
        dtype = CHANNELED.get(self.scheme, torch.int8)
        assert self.values_OI.dtype == dtype, f"values are {self.values_OI.dtype}, not {dtype}"
        assert self.scale_OG.shape == (rows, groups), f"scales are {tuple(self.scale_OG.shape)}"
        assert columns % groups == 0, f"{columns} inputs do not divide into {groups} groups"

    @property
    def layout(self) -> Layout:
        """The scheme with its group size."""
        return Layout(self.scheme, self.group_size)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.values_OI.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.values_OI.shape[1]

    def to(self, device: torch.device) -> "QuantizedWeight":
        """Return the same weight on a device."""
        return replace(self, values_OI=self.values_OI.to(device), scale_OG=self.scale_OG.to(device))

    def computable(self) -> "QuantizedWeight":
        """Return the same weight in a format that operators compute: int3 as int4, all by group.

        The scale of a channel is repeated for groups of a size that operators take, if one divides.
        """
        scheme = self.layout.computable().scheme
        if scheme not in GROUPED or self.scale_OG.shape[1] > 1:
            return replace(self, scheme=scheme)
        columns = self.in_features
        size = next((s for s in _COMPUTED_GROUPS if columns % s == 0), columns)
        scale_OG = self.scale_OG.repeat(1, columns // size)
        return replace(self, scheme=scheme, scale_OG=scale_OG, group_size=size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight_OI these values stand for."""
        values_OGS = self.values_OI.float().unflatten(1, (self.scale_OG.shape[1], -1))
        return (values_OGS * self.scale_OG.float()[:, :, None]).flatten(1).to(dtype)


def value_range(scheme: Scheme) -> tuple[int, int]:
    """Return the smallest and largest value of a quantized scheme."""
    assert scheme != "bf16", "a dense weight has no range of values"
    if scheme == "fp8":
        return (-FP8_MAX, FP8_MAX)
    half = 1 << (PACKED_BITS.get(scheme, 8) - 1)
    return (-half, half - 1)


def round_values_(scaled: Tensor, scheme: Scheme) -> Tensor:
    """Round float weights, divided by their scale, to a scheme's values; may work in place."""
    scaled.clamp_(*value_range(scheme))
    return scaled.to(torch.float8_e4m3fn).float() if scheme == "fp8" else scaled.round_()


def round_scale(scale: Tensor) -> Tensor:
    """Return scales as they are stored (bfloat16 values in float32), 1 where they would be 0."""
    stored = scale.to(torch.bfloat16).float()
    return torch.where(stored > 0, stored, 1.0)


def round_to_scale(weight_OI: Tensor, scale_OG: Tensor, layout: Layout) -> QuantizedWeight:
    """Round a dense weight to the nearest values at given scales, clipped to the range."""
    scale_OG = round_scale(scale_OG)
    weight_OGS = weight_OI.float().unflatten(1, (scale_OG.shape[1], -1))
    values_OGS = round_values_(weight_OGS / scale_OG[:, :, None], layout.scheme)
    values_OI = values_OGS.flatten(1).to(CHANNELED.get(layout.scheme, torch.int8))
    return QuantizedWeight(layout.scheme, values_OI, scale_OG, layout.group_size)


def quantize_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations symmetrically to int8, one scale a row (token).

    Returns values_NI int8 and scale_N1 float32. This is compressed-tensors' dynamic per-token
    scheme; rows are independent of each other.
    """
    x_NI = x_NI.float()
    scale_N1 = (x_NI.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x_NI / scale_N1).round().clamp(-128, 127).to(torch.int8), scale_N1


def quantize_rows_fp8(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations to float8_e4m3fn, one scale a row (token), as `quantize_rows` to int8.

    The largest value of a row becomes 448. Casting rounds to nearest, so no value passes the range.
    """
    largest_N1 = torch.linalg.vector_norm(
        x_NI, torch.inf, dim=-1, keepdim=True, dtype=torch.float32
    )
    scale_N1 = (largest_N1 / FP8_MAX).clamp_min(1e-12)
    return (x_NI / scale_N1).to(torch.float8_e4m3fn), scale_N1


def reference_linear(x_NI: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return what a quantized layer computes on x_NI, plainly, in x's dtype; no bias.

    Works on a block of outputs at a time, so a dequantized copy of the weight never exists.
    """
    if weight.scheme in CHANNELED:
        quantize = quantize_rows_fp8 if weight.scheme == "fp8" else quantize_rows
        values_NI, scale_N1 = quantize(x_NI)
        y_NO = _by_blocks(values_NI.float(), weight.values_OI)
        return (y_NO * scale_N1 * weight.scale_OG.float()[:, 0]).to(x_NI.dtype)
    dtype = x_NI.dtype
    if weight.scheme == "w4a8":
        values_NI, scale_N1 = quantize_rows(x_NI)
        return (_dequantized_linear(values_NI.float(), weight) * scale_N1).to(dtype)
    return _dequantized_linear(x_NI, weight)


def num_words(num_values: int, num_bits: int) -> int:
    """Return how many int32 hold so many values of few bits."""
    return -(-num_values * num_bits // _WORD_BITS)


def pack_values(values_OI: Tensor, num_bits: int = 4) -> Tensor:
    """Pack values (one a byte) of 1 to 8 bits into int32, first value in the lowest bits.

    This is compressed-tensors' `pack-quantized`: values are offset by half their range and lie
    without gaps, across words where their bits do not divide 32; rows are padded to a word.
    """
    in_features = values_OI.shape[1]
    offset = 1 << (num_bits - 1)
    values_OI = functional.pad(values_OI.to(torch.int64) + offset, (0, -in_features % _WORD_BITS))
    # As many words as a value has bits hold 32 values.
    values_OUE = values_OI.unflatten(1, (-1, _WORD_BITS))
    words_OUB = torch.zeros(
        *values_OUE.shape[:2], num_bits, dtype=torch.int64, device=values_OI.device
    )
    for place in range(_WORD_BITS):
        word, shift = divmod(place * num_bits, _WORD_BITS)
        words_OUB[..., word] |= values_OUE[..., place] << shift
        if shift + num_bits > _WORD_BITS:
            words_OUB[..., word + 1] |= values_OUE[..., place] >> (_WORD_BITS - shift)
    # The cast drops what lies in the next word, and the top bit becomes the sign.
    words_OW = words_OUB.flatten(1)[:, : num_words(in_features, num_bits)]
    return words_OW.to(torch.int32).contiguous()


def unpack_values(packed_OW: Tensor, in_features: int, num_bits: int = 4) -> Tensor:
    """Return the int8 values_OI of `pack_values`."""
    words_OW = functional.pad(
        packed_OW.to(torch.int64) & _WORD_MASK, (0, -packed_OW.shape[1] % num_bits)
    )
    words_OUB = words_OW.unflatten(1, (-1, num_bits))
    values = []
    for place in range(_WORD_BITS):
        word, shift = divmod(place * num_bits, _WORD_BITS)
        value_OU = words_OUB[..., word] >> shift
        if shift + num_bits > _WORD_BITS:
            value_OU = value_OU | (words_OUB[..., word + 1] << (_WORD_BITS - shift))
        values.append((value_OU & ((1 << num_bits) - 1)).to(torch.int8))
    values_OI = torch.stack(values, dim=-1).flatten(1)[:, :in_features]
    return (values_OI - (1 << (num_bits - 1))).contiguous()


def _by_blocks(x_NI: Tensor, values_OI: Tensor) -> Tensor:
    return torch.cat(
        [functional.linear(x_NI, block.float()) for block in values_OI.split(REFERENCE_BLOCK)],
        dim=-1,
    )


def _dequantized_linear(x_NI: Tensor, weight: QuantizedWeight) -> Tensor:
    return torch.cat(
        [
            functional.linear(x_NI, _rows(weight, start).dequantize(x_NI.dtype))
            for start in range(0, weight.out_features, REFERENCE_BLOCK)
        ],
        dim=-1,
    )


def _rows(weight: QuantizedWeight, start: int) -> QuantizedWeight:
    chosen = slice(start, start + REFERENCE_BLOCK)
    return QuantizedWeight(
        weight.scheme, weight.values_OI[chosen], weight.scale_OG[chosen], weight.group_size
    )
