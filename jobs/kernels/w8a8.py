"""Operators for W8A8: int8 weights per output channel, int8 activations per token.

Takes rows of activations and a packed weight; gives rows of outputs. All quantize activations as
formats.quantize_rows does, so they differ from the reference by rounding of the result alone.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import blocks, build, memory, native, reference
from jobs.kernels.formats import quantize_rows
from jobs.kernels.operator import (
    Operator,
    Packed,
    Problem,
    Weight,
    add_bias,
    quantized,
)
from jobs.kernels.rows import padded_inputs

_INT_MM_MIN_ROWS = 32
_MAX_INPUTS = 66_000  # sums of more products of two bytes leave 32 bits
_in_place = blocks.in_place("rs_linear_w8a8", "pppppppnnnnii", takes_int8=True)


def _refuses_cpp(problem: Problem) -> str | None:
    if problem.in_features > _MAX_INPUTS:
        return f"it takes {_MAX_INPUTS} inputs at most"
    return blocks.refuses(problem)


def _pack_cpp(weight: Weight, problem: Problem) -> Packed:
    values_OI = blocks.pad_outputs(quantized(weight).values_OI)
    values_OI = functional.pad(
        values_OI, (0, padded_inputs(problem.in_features) - values_OI.shape[1])
    )
    layout = native.weight_layout()
    # An offset of 128 flips the top bit.
    packed_KI = blocks.interleave(
        values_OI.view(torch.uint8) ^ layout.int8_offset, layout.int8_inputs
    )
    scale_O = blocks.pad_outputs(quantized(weight).scale_OG.float())[:, 0]
    return memory.resident(packed_KI), scale_O.contiguous()


@functools.cache
def _load_zentorch() -> str | None:
    """Load zentorch's operators; return why they cannot be used, or None.

    The library is loaded without its Python package, which would import all of torch's compiler
    (3 s and 120 MB a process) to register fusions that are not used here.
    """
    found = importlib.util.find_spec("zentorch")
    if found is None or found.origin is None:
        return "zentorch is not installed (pip install 'raysmith[fast]')"
    folder = Path(found.origin).parent
    built_for = _torch_version_of(folder / "_build_info.py")
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"zentorch is built for torch {built_for}, and this is torch {torch.__version__}"
    # Without this the library packs weights by one block size and multiplies by another, chosen
    # from the number of rows: for wide layers its prepacked results are wrong (zentorch 2.13.0.2).
    os.environ.setdefault("ZENDNNL_DLP_M_HINT", "0")
    try:
        torch.ops.load_library(folder / "libzentorch.so")
    except OSError as error:
        return f"zentorch does not load: {error}"
    return None


def _torch_version_of(build_info: Path) -> str:
    """Return the torch version a zentorch installation was built for, "" if it does not say."""
    if not build_info.is_file():
        return ""
    match = re.search(r"__torchversion__\s*=\s*[\"']([^\"']+)", build_info.read_text())
    return match[1] if match else ""


def _refuses_zentorch(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return "it runs on CPUs only"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {problem.dtype}"
    if "avx512f" not in build.cpu_flags():  # It does not look, and the process would die.
        return "this CPU lacks avx512f"
    return _load_zentorch()


def _pack_zentorch(weight: Weight, problem: Problem) -> Packed:
    ops = torch.ops.zentorch
    values_OI = quantized(weight).values_OI.contiguous()
    packed = ops.zentorch_weight_prepack_for_dynamic_qlinear(values_OI)
    return packed, quantized(weight).scale_OG[:, 0].contiguous()


def _run_zentorch(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    return torch.ops.zentorch.zentorch_dynamic_qlinear(
        x_NI.contiguous(), packed[0], packed[1], bias_O, is_weight_prepacked=True
    )


def _refuses_int_mm(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return None
    if problem.device.type != "cuda":
        return f"it runs on CPUs and CUDA, not {problem.device.type}"
    if problem.out_features % 8 or problem.in_features % 8:
        return "CUDA's int8 product needs features that are multiples of 8"
    return None


def _pack_int_mm(weight: Weight, problem: Problem) -> Packed:
    return quantized(weight).values_OI.contiguous(), quantized(weight).scale_OG[:, 0].contiguous()


def _run_int_mm(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    values_NI, scale_N1 = quantize_rows(x_NI)
    rows = values_NI.shape[0]
    if values_NI.is_cuda:  # CUDA's product takes more than 16 rows, in multiples of 8.
        missing = max(_INT_MM_MIN_ROWS - rows, -rows % 8)
        values_NI = functional.pad(values_NI, (0, 0, 0, missing))
    y_NO = torch._int_mm(values_NI, packed[0].t())[:rows].float()
    return add_bias((y_NO * scale_N1 * packed[1]).to(x_NI.dtype), bias_O)


OPERATORS = (
    blocks.operator("w8a8", _refuses_cpp, _pack_cpp, _in_place),
    Operator("zentorch", "w8a8", _refuses_zentorch, _pack_zentorch, _run_zentorch),
    Operator("int_mm", "w8a8", _refuses_int_mm, _pack_int_mm, _run_int_mm, has_exact_rows=True),
    reference.operator("w8a8"),
)
