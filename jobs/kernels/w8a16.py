"""Operators for W8A16: int8 weights with a scale per group of inputs, 16-bit activations.

Takes rows of activations and a packed weight; gives rows of outputs.
"""

import torch

from jobs.kernels import blocks, reference
from jobs.kernels.operator import Packed, Problem, Weight, quantized

_STEP = 4  # inputs that the C++ kernel reads at a time
_in_place = blocks.in_place("rs_linear_w8a16", "ppppnnnnnnii", takes_int8=False)


def _refuses_cpp(problem: Problem) -> str | None:
    return blocks.refuses(problem, group_multiple=_STEP)


def _pack_cpp(weight: Weight, problem: Problem) -> Packed:
    """Return int8 weights as csrc/linear_groups.h describes them, scales among them."""
    weight = quantized(weight)
    values_OI = blocks.pad_outputs(weight.values_OI).view(torch.uint8)
    return blocks.by_group(blocks.interleave(values_OI, 1), weight.scale_OG)


OPERATORS = (
    blocks.operator("w8a16", _refuses_cpp, _pack_cpp, _in_place),
    reference.operator("w8a16"),
)
