"""Operators for W4A8: int4 weights with a scale per group of inputs, int8 activations per token.

Takes rows of activations and a packed weight; gives rows of outputs. Activations are quantized as
formats.quantize_rows does.
"""

from torch import Tensor

from jobs.kernels import blocks, native
from jobs.kernels.operator import InPlace, Operator, Packed, Problem, never_refuses
from jobs.kernels.rows import QuantizedRows
from jobs.kernels.w4a16 import pack_blocks, pack_reference, run_reference

_SUM_BLOCK = 32  # inputs that share a sum in QuantizedRows
_multiply = native.function("rs_linear_w4a8", "ppppppnnnnnii")


def _refuses_vnni(problem: Problem) -> str | None:
    return blocks.refuses(problem, group_multiple=_SUM_BLOCK)


def _multiply_vnni(
    x: Tensor | QuantizedRows,
    packed: Packed,
    bias_O: Tensor | None,
    y_NO: Tensor,
    problem: Problem,
    accumulate: bool,  # noqa: FBT001 - as InPlace.multiply declares
) -> None:
    assert isinstance(x, QuantizedRows), "this operator takes quantized rows"
    tensors = (x.values_NS, x.scale_N, x.sums_NB, *packed, bias_O, y_NO)
    shape = (x.rows, problem.in_features, problem.out_features, problem.layout.group_size)
    addresses = map(native.address, tensors)
    _multiply(*addresses, *shape, y_NO.stride(0), accumulate, native.num_threads())


OPERATORS = (
    blocks.operator("vnni", "w4a8", _refuses_vnni, pack_blocks, InPlace(True, _multiply_vnni)),
    Operator("reference", "w4a8", never_refuses, pack_reference, run_reference),
)
