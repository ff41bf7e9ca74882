"""The plain arithmetic of quantized formats as operators: where nothing else runs.

Takes a format that is computed (int3 is as int4); gives its operator, which holds values in as few
bits as they have on disk.
"""

import torch
from torch import Tensor

from jobs.kernels.formats import (
    PACKED_BITS,
    REFERENCE_BLOCK,
    QuantizedWeight,
    Scheme,
    pack_values,
    reference_linear,
    unpack_values,
)
from jobs.kernels.operator import (
    Operator,
    Packed,
    Problem,
    Weight,
    add_bias,
    never_refuses,
    quantized,
)

NAME = "reference"
_INT4_BITS = 4


def operator(scheme: Scheme) -> Operator:
    """Return the operator of a format."""
    if PACKED_BITS.get(scheme) == _INT4_BITS:
        return Operator(NAME, scheme, never_refuses, _pack_int4, _run_int4)
    return Operator(NAME, scheme, never_refuses, _pack_bytes, _run_bytes)


def _pack_bytes(weight: Weight, problem: Problem) -> Packed:
    return quantized(weight).values_OI, quantized(weight).scale_OG


def _run_bytes(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    layout = problem.layout
    weight = QuantizedWeight(layout.scheme, packed[0], packed[1], layout.group_size)
    return add_bias(reference_linear(x_NI, weight), bias_O)


def _pack_int4(weight: Weight, problem: Problem) -> Packed:
    return pack_values(quantized(weight).values_OI), quantized(weight).scale_OG


def _run_int4(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    """Unpack a block of outputs at a time."""
    parts = []
    blocks = (tensor.split(REFERENCE_BLOCK) for tensor in packed)
    for packed_OW, scale_OG in zip(*blocks, strict=True):
        values_OI = unpack_values(packed_OW, problem.in_features)
        block = QuantizedWeight(
            problem.layout.scheme, values_OI, scale_OG, problem.layout.group_size
        )
        parts.append(reference_linear(x_NI, block))
    return add_bias(torch.cat(parts, dim=-1), bias_O)
