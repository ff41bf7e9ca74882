"""Operators for FP8: e4m3 weights per output channel, e4m3 activations per token.

Takes rows of activations and a packed weight; gives rows of outputs. All quantize activations as
formats.quantize_rows_fp8 does, so they differ from the reference by rounding of the result alone.
"""

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import reference
from jobs.kernels.formats import quantize_rows_fp8
from jobs.kernels.operator import (
    Operator,
    Packed,
    Problem,
    Weight,
    add_bias,
    quantized,
)

_MULTIPLE = 16  # of features, as torch._scaled_mm asks; of rows, which the library's tiles like
_CAPABILITY = (8, 9)  # the first CUDA devices that multiply FP8


def _refuses_scaled_mm(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return "it runs on CUDA only"
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < _CAPABILITY:
        return f"it needs compute capability 8.9, and the device has {capability}"
    if problem.out_features % _MULTIPLE or problem.in_features % _MULTIPLE:
        return "CUDA's FP8 product needs features that are multiples of 16"
    return None


def _pack_scaled_mm(weight: Weight, problem: Problem) -> Packed:
    return quantized(weight).values_OI.contiguous(), quantized(weight).scale_OG.t().contiguous()


def _run_scaled_mm(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    # Scales by row: [N, 1] and [1, O], contiguous; the second factor lies column by column. Sums
    # are float32 (`use_fast_accum` would round them to 14 bits). In all releases of torch the
    # result may be bfloat16.
    rows = x_NI.shape[0]
    if missing := -rows % _MULTIPLE:
        x_NI = functional.pad(x_NI, (0, 0, 0, missing))
    values_NI, scale_N1 = quantize_rows_fp8(x_NI)
    y_NO = torch._scaled_mm(
        values_NI,
        packed[0].t(),
        scale_a=scale_N1,
        scale_b=packed[1],
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return add_bias(y_NO[:rows].to(x_NI.dtype), bias_O)


OPERATORS = (
    Operator("scaled_mm", "fp8", _refuses_scaled_mm, _pack_scaled_mm, _run_scaled_mm),
    reference.operator("fp8"),
)
