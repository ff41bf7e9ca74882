"""Operators that compute a linear layer of a given format, and the choice among them.

Takes a format, a shape, a type and a device; gives the operator that is right and fastest there,
by a short measurement. It does not know about models or modules.

Every operator agrees with formats.reference_linear, and a row's result does not depend on the
other rows. That excludes `quantized::linear_dynamic`, which scales activations by the whole batch.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import EngineError
from jobs.kernels import w4a16, w8a8
from jobs.kernels.formats import (
    DEFAULT_GROUP_SIZE,
    Layout,
    QuantizedWeight,
    Scheme,
    reference_linear,
    round_to_scale,
)
from jobs.kernels.operator import Operator, Packed, Problem

TOLERANCE = 0.01  # Largest error over largest output, above bfloat16's rounding of activations.
_PROBE_ROWS = (1, 5, 32)
_TIMED_ROWS = (1, 32)
_REPEATS = 7
_CLEARLY = 1.25
_OPERATORS: tuple[Operator, ...] = (*w8a8.OPERATORS, *w4a16.OPERATORS)


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

    The time is the geometric mean of the medians at 1 and 32 rows; of near ties the first in the
    order of preference is taken. An operator whose result is
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
    # In order of preference: a near tie must not fall one way here and another way there.
    limit_us = _CLEARLY * min(microseconds.values())
    chosen = next(name for name, time_us in microseconds.items() if time_us <= limit_us)
    return Choice(chosen, microseconds, refused)


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
