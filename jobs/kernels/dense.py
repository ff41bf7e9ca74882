"""Operators for dense weights in bfloat16, rows in float32 or bfloat16.

Takes rows of activations and a weight; gives rows of outputs. With float32 rows all compute in
float32, so they differ by the order of sums alone.
"""

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import blocks, memory
from jobs.kernels.operator import Operator, Packed, Problem, Weight, never_refuses

_in_place = blocks.in_place("rs_linear_dense", "ppppnnnnnii", takes_int8=False)


def _refuses_cpp(problem: Problem) -> str | None:
    if problem.dtype != torch.float32:
        return f"it computes float32, not {problem.dtype}"
    return blocks.refuses(problem)


def _pack_cpp(weight: Weight, problem: Problem) -> Packed:
    assert isinstance(weight, Tensor), "this operator takes dense weights"
    weight_OI = blocks.pad_outputs(weight.to(torch.bfloat16))
    weight_OI = functional.pad(weight_OI, (0, weight_OI.shape[1] % 2))
    return (memory.resident(blocks.interleave(weight_OI, 2)),)


def _pack_torch(weight: Weight, problem: Problem) -> Packed:
    assert isinstance(weight, Tensor), "this operator takes dense weights"
    return (weight.to(problem.dtype),)


def _run_torch(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    return functional.linear(x_NI, packed[0], bias_O)


OPERATORS = (
    blocks.operator("bf16", _refuses_cpp, _pack_cpp, _in_place),
    Operator("dense", "bf16", never_refuses, _pack_torch, _run_torch),
)
