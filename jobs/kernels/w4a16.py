"""Operators for W4A16: int4 weights with a scale per group of inputs, 16-bit activations.

Takes rows of activations and a packed weight; gives rows of outputs.
"""

import torch
from torch import Tensor

from jobs.kernels import blocks, reference
from jobs.kernels.operator import (
    Operator,
    Packed,
    Problem,
    Weight,
    add_bias,
    quantized,
)

_GROUP_SIZES = (32, 64, 128, 256)
_CUDA_TILES = 8
_STEP = 8  # inputs that the C++ kernel reads at a time
_in_place = blocks.in_place("rs_linear_w4a16", "ppppnnnnnnii", takes_int8=False)


def pack_blocks(weight: Weight, problem: Problem) -> Packed:
    """Return int4 weights as csrc/linear_groups.h describes them, scales among them."""
    weight = quantized(weight)
    nibbles_OI = (blocks.pad_outputs(weight.values_OI) + 8).view(torch.uint8)
    low, high = nibbles_OI.unflatten(1, (-1, 2, 4)).unbind(2)
    bytes_KI = blocks.interleave((low | high << 4).flatten(1), 4)
    return blocks.by_group(bytes_KI, weight.scale_OG)


def _refuses_cpp(problem: Problem) -> str | None:
    return blocks.refuses(problem, group_multiple=_STEP)


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


def _pack_int4pack(weight: Weight, problem: Problem) -> Packed:
    weight = quantized(weight)
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


OPERATORS = (
    blocks.operator("w4a16", _refuses_cpp, pack_blocks, _in_place),
    Operator("int4pack", "w4a16", _refuses_int4pack, _pack_int4pack, _run_int4pack),
    reference.operator("w4a16"),
)
