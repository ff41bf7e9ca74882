"""Operators for W4A8: int4 weights with a scale per group of inputs, int8 activations per token.

Takes rows of activations and a packed weight; gives rows of outputs. Activations are quantized as
formats.quantize_rows does.
"""

from jobs.kernels import blocks, reference
from jobs.kernels.operator import Problem
from jobs.kernels.w4a16 import pack_blocks

_SUM_BLOCK = 32  # inputs that share a sum in QuantizedRows
_in_place = blocks.in_place("rs_linear_w4a8", "ppppppnnnnnii", takes_int8=True)


def _refuses_cpp(problem: Problem) -> str | None:
    return blocks.refuses(problem, group_multiple=_SUM_BLOCK)


OPERATORS = (
    blocks.operator("w4a8", _refuses_cpp, pack_blocks, _in_place),
    reference.operator("w4a8"),
)
