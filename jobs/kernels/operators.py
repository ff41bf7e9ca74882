"""Operators that compute a linear layer of a given format, and the choice among them.

Takes a format, a shape, a type and a device; gives the operator that is right and fastest there,
by a short measurement. It does not know about models or modules.

Every operator agrees with formats.reference_linear, and a row's result does not depend on the
other rows. That excludes `quantized::linear_dynamic`, which scales activations by the whole batch.
"""

import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import EngineError
from jobs.kernels.formats import (
    DEFAULT_GROUP_SIZE,
    Layout,
    QuantizedWeight,
    Scheme,
    pack_int4,
    quantize_rows,
    reference_linear,
    round_to_scale,
    unpack_int4,
)

TOLERANCE = 0.01  # Largest error over largest output, above bfloat16's rounding of activations.
_PROBE_ROWS = (1, 5, 32)
_TIMED_ROWS = (1, 32)
_REPEATS = 7
_TINYGEMM_GROUPS = (32, 64, 128, 256)
_TINYGEMM_TILES = 8
_INT_MM_MIN_ROWS = 32

Packed = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One linear layer to be computed: its format and shape, the activations' type, the device."""

    layout: Layout
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Operator:
    """A way to compute quantized layers.

    `pack` turns a weight into this operator's own tensors, which are all that is kept;
    `run(x_NI, packed, bias_O, problem)` gives y_NO in x's dtype; `refuses` gives the reason why a
    problem is beyond it, or None.
    """

    name: str
    scheme: Scheme
    refuses: Callable[[Problem], str | None]
    pack: Callable[[QuantizedWeight, Problem], Packed]
    run: Callable[[Tensor, Packed, Tensor | None, Problem], Tensor]


@dataclass(frozen=True)
class Choice:
    """The operator chosen, microseconds of each that was right by name, and why others were not."""

    operator: str
    microseconds: dict[str, float]
    refused: dict[str, str]


def available(scheme: Scheme, device: torch.device | str = "cpu") -> list[str]:
    """Return the names of operators of a format that can run on a device at all."""
    if scheme == "bf16":
        return ["dense"]
    probe = Problem(
        Layout(scheme, DEFAULT_GROUP_SIZE if scheme == "w4a16" else None),
        256,
        256,
        torch.bfloat16,
        torch.device(device),
    )
    return [op.name for op in _OPERATORS if op.scheme == scheme and op.refuses(probe) is None]


def find(name: str, problem: Problem) -> Operator:
    """Return an operator by name; EngineError if there is none or it refuses the problem."""
    for operator in _OPERATORS:
        if operator.name == name and operator.scheme == problem.layout.scheme:
            if (reason := operator.refuses(problem)) is not None:
                raise EngineError(f"operator `{name}` cannot run this layer: {reason}.")
            return operator
    names = [op.name for op in _OPERATORS if op.scheme == problem.layout.scheme]
    raise EngineError(
        f"no operator `{name}` for {problem.layout.scheme}; there are: {', '.join(names)}."
    )


def choose(
    scheme: Scheme,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    group_size: int | None = None,
) -> Choice:
    """Return the fastest operator that computes this layer correctly here, measured once.

    The time is the geometric mean of the medians at 1 and 32 rows. An operator whose result is
    off by more than `TOLERANCE` at 1, 5 or 32 rows is refused. The answer is
    kept for the life of the process, per number of threads.
    """
    if scheme == "bf16":
        return Choice("dense", {}, {})
    if scheme == "w4a16":
        group_size = group_size or min(DEFAULT_GROUP_SIZE, in_features)
    layout = Layout(scheme, group_size if scheme == "w4a16" else None)
    problem = Problem(layout, out_features, in_features, dtype, torch.device(device))
    return _choose(problem, torch.get_num_threads())


@functools.cache
def _choose(problem: Problem, num_threads: int) -> Choice:
    weight, x_NI = _probe(problem)
    expected_NO = reference_linear(x_NI.float(), weight)
    microseconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for operator in _OPERATORS:
        if operator.scheme != problem.layout.scheme:
            continue
        reason = operator.refuses(problem)
        if reason is None:
            packed = operator.pack(weight, problem)
            reason = _wrong(operator, packed, problem, x_NI, expected_NO)
        if reason is not None:
            refused[operator.name] = reason
            continue
        times_us = [
            _median_us(functools.partial(operator.run, x_NI[:rows], packed, None, problem))
            for rows in _TIMED_ROWS
        ]
        microseconds[operator.name] = statistics.geometric_mean(times_us)
    assert "reference" in microseconds, f"the reference disagrees with itself: {refused}"
    return Choice(min(microseconds, key=microseconds.__getitem__), microseconds, refused)


def _probe(problem: Problem) -> tuple[QuantizedWeight, Tensor]:
    """Return a weight and activations of this shape that look like a model's."""
    generator = torch.Generator().manual_seed(0)
    shape = (problem.out_features, problem.in_features)
    weight_OI = torch.randn(shape, generator=generator) * 0.02
    groups = problem.layout.num_groups(problem.in_features)
    high = 127 if problem.layout.scheme == "w8a8" else 7
    scale_OG = weight_OI.unflatten(1, (groups, -1)).abs().amax(dim=-1) / high
    weight = round_to_scale(weight_OI, scale_OG, problem.layout).to(problem.device)
    x_NI = torch.randn((max(_PROBE_ROWS), problem.in_features), generator=generator)
    return weight, x_NI.to(problem.device, problem.dtype)


def _wrong(
    operator: Operator, packed: Packed, problem: Problem, x_NI: Tensor, expected_NO: Tensor
) -> str | None:
    """Return what is wrong with an operator's results, or None."""
    largest = expected_NO.abs().max().clamp_min(1e-12)
    for rows in _PROBE_ROWS:
        y_NO = operator.run(x_NI[:rows], packed, None, problem).float()
        error = float((y_NO - expected_NO[:rows]).abs().max() / largest)
        if not error <= TOLERANCE:
            return f"its result is off by {error:.2g} of the largest value at {rows} rows"
    return None


def _median_us(call: Callable[[], Tensor]) -> float:
    call()
    times_us = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        result = call()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        times_us.append((time.perf_counter() - start_s) * 1e6)
    return statistics.median(times_us)


def _add(y_NO: Tensor, bias_O: Tensor | None) -> Tensor:
    return y_NO if bias_O is None else y_NO + bias_O


# --- the plain reference, one a format -----------------------------------------------------------


def _pack_reference_w8a8(weight: QuantizedWeight, problem: Problem) -> Packed:
    return weight.values_OI, weight.scale_OG


def _run_reference_w8a8(
    x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem
) -> Tensor:
    return _add(reference_linear(x_NI, QuantizedWeight("w8a8", packed[0], packed[1], None)), bias_O)


def _pack_reference_w4a16(weight: QuantizedWeight, problem: Problem) -> Packed:
    return pack_int4(weight.values_OI), weight.scale_OG


def _run_reference_w4a16(
    x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem
) -> Tensor:
    parts = []
    for packed_OW, scale_OG in zip(packed[0].split(256), packed[1].split(256), strict=True):
        values_OI = unpack_int4(packed_OW, problem.in_features)
        block = QuantizedWeight("w4a16", values_OI, scale_OG, problem.layout.group_size)
        parts.append(reference_linear(x_NI, block))
    return _add(torch.cat(parts, dim=-1), bias_O)


# --- W8A8 ----------------------------------------------------------------------------------------


@functools.cache
def _load_zentorch() -> str | None:
    """Import zentorch; return why it cannot be used, or None."""
    if importlib.util.find_spec("zentorch") is None:
        return "zentorch is not installed (pip install 'raysmith[fast]')"
    # Without this the library packs weights by one block size and multiplies by another, chosen
    # from the number of rows: for wide layers its prepacked results are wrong (zentorch 2.13.0.2).
    os.environ.setdefault("ZENDNNL_DLP_M_HINT", "0")
    try:
        importlib.import_module("zentorch")
    except (ImportError, OSError, RuntimeError) as error:
        return f"zentorch does not load: {error}"
    return None


def _refuses_zentorch(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return "it runs on CPUs only"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16, not {problem.dtype}"
    return _load_zentorch()


def _pack_zentorch(weight: QuantizedWeight, problem: Problem) -> Packed:
    ops = torch.ops.zentorch
    packed = ops.zentorch_weight_prepack_for_dynamic_qlinear(weight.values_OI.contiguous())
    return packed, weight.scale_OG[:, 0].contiguous()


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


def _pack_int_mm(weight: QuantizedWeight, problem: Problem) -> Packed:
    return weight.values_OI.contiguous(), weight.scale_OG[:, 0].contiguous()


def _run_int_mm(x_NI: Tensor, packed: Packed, bias_O: Tensor | None, problem: Problem) -> Tensor:
    values_NI, scale_N1 = quantize_rows(x_NI)
    rows = values_NI.shape[0]
    if values_NI.is_cuda:  # CUDA's product takes more than 16 rows, in multiples of 8.
        missing = max(_INT_MM_MIN_ROWS - rows, -rows % 8)
        values_NI = functional.pad(values_NI, (0, 0, 0, missing))
    y_NO = torch._int_mm(values_NI, packed[0].t())[:rows].float()
    return _add((y_NO * scale_N1 * packed[1]).to(x_NI.dtype), bias_O)


# --- W4A16 ---------------------------------------------------------------------------------------


def _refuses_int4pack(problem: Problem) -> str | None:
    group_size = problem.layout.group_size
    if group_size not in _TINYGEMM_GROUPS:
        return f"it takes groups of {_TINYGEMM_GROUPS}, not {group_size}"
    if problem.device.type == "cpu":
        return None if problem.out_features % 16 == 0 else "out_features is no multiple of 16"
    if problem.device.type != "cuda":
        return f"it runs on CPUs and CUDA, not {problem.device.type}"
    if problem.out_features % 8 or problem.in_features % (16 * _TINYGEMM_TILES):
        return "CUDA's int4 product needs multiples of 8 outputs and 128 inputs"
    return None


def _pack_int4pack(weight: QuantizedWeight, problem: Problem) -> Packed:
    shifted_OI = weight.values_OI.to(torch.int32) + 8
    if problem.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted_OI, 1)
    else:
        pairs_OP = (shifted_OI[:, ::2] << 4 | shifted_OI[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs_OP, _TINYGEMM_TILES)
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
    return _add(y_NO.to(x_NI.dtype), bias_O)


def _never_refuses(problem: Problem) -> str | None:
    return None


_OPERATORS = (
    Operator("zentorch", "w8a8", _refuses_zentorch, _pack_zentorch, _run_zentorch),
    Operator("int_mm", "w8a8", _refuses_int_mm, _pack_int_mm, _run_int_mm),
    Operator("reference", "w8a8", _never_refuses, _pack_reference_w8a8, _run_reference_w8a8),
    Operator("int4pack", "w4a16", _refuses_int4pack, _pack_int4pack, _run_int4pack),
    Operator("reference", "w4a16", _never_refuses, _pack_reference_w4a16, _run_reference_w4a16),
)
