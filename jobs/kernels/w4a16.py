"""Operators for W4A16: int4 weights with a scale per group of inputs, 16-bit activations.

Takes rows of activations and a packed weight; gives rows of outputs.
"""

import torch
from torch import Tensor

from jobs.kernels.formats import QuantizedWeight, pack_int4, reference_linear, unpack_int4
from jobs.kernels.operator import Operator, Packed, Problem, add_bias, never_refuses

_GROUP_SIZES = (32, 64, 128, 256)
_CUDA_TILES = 8
_BLOCK = 256


def _refuses_int4pack(problem: Problem) -> str | None:
    group_size = problem.layout.group_size
    if group_size not in _GROUP_SIZES:
        return f"it takes groups of {_GROUP_SIZES}, not {group_size}"
    if problem.device.type == "cpu":
        return None if problem.out_features % 16 == 0 else "out_features is no multiple of 16"
    if problem.device.type != "cuda":
        return f"it runs on CPUs and CUDA, not {problem.device.type}"
    if problem.out_features % 8 or problem.in_features % (16 * _CUDA_TILES):
        return "CUDA's int4 product needs multiples of 8 outputs and 128 inputs"
    return None


def _pack_int4pack(weight: QuantizedWeight, problem: Problem) -> Packed:
    shifted_OI = weight.values_OI.to(torch.int32) + 8
    if problem.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted_OI, 1)
    else:
        pairs_OP = (shifted_OI[:, ::2] << 4 | shifted_OI[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs_OP, _CUDA_TILES)
    scale_GO = weight.scale_OG.t()
    scale_zero_GO2 = torch.stack([scale_GO, torch.zeros_like(scale_GO)], dim=-1)
    return packed, scale_zero_GO2.contiguous().to(torch.bfloat16)


def _run_int4pack(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    # The A16 of W4A16: activations enter in bfloat16. In float32 the CPU kernel is 50x slower.
    is_cpu = x_NI.device.type == "cpu"
    ops = torch.ops.aten
    multiply = ops._weight_int4pack_mm_for_cpu if is_cpu else ops._weight_int4pack_mm
    group_size = problem.layout.group_size
    y_NO = multiply(x_NI.to(torch.bfloat16).contiguous(), packed[0], group_size, packed[1])
    return add_bias(y_NO.to(x_NI.dtype), bias_O)


def _pack_reference(weight: QuantizedWeight, problem: Problem) -> Packed:
    return pack_int4(weight.values_OI), weight.scale_OG


def _run_reference(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    parts = []
    for packed_OW, scale_OG in zip(packed[0].split(_BLOCK), packed[1].split(_BLOCK), strict=True):
        values_OI = unpack_int4(packed_OW, problem.in_features)
        block = QuantizedWeight("w4a16", values_OI, scale_OG, problem.layout.group_size)
        parts.append(reference_linear(x_NI, block))
    return add_bias(torch.cat(parts, dim=-1), bias_O)


OPERATORS = (
    Operator("int4pack", "w4a16", _refuses_int4pack, _pack_int4pack, _run_int4pack),
    Operator("reference", "w4a16", never_refuses, _pack_reference, _run_reference),
)
