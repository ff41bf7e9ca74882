"""Operators that compute a linear layer of a given format, and the choice among them.

Takes a format, a shape, a type and a device; gives the operator that is right and fastest there,
by a short measurement that is remembered. It does not know about models or modules.

Every operator agrees with formats.reference_linear, and but for its last bits a row's result does
not depend on the other rows. That excludes `quantized::linear_dynamic`, which scales activations by
the whole batch. Where the preferred operator keeps the last bits too, only such operators are
chosen from: an answer shall not depend on who else is answered.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cluster.errors import EngineError
from jobs.kernels import choices, dense, fp8, reference, w4a8, w4a16, w8a8, w8a16
from jobs.kernels.choices import Choice
from jobs.kernels.formats import (
    DEFAULT_GROUP_SIZE,
    GROUPED,
    Layout,
    Scheme,
    reference_linear,
    round_to_scale,
    value_range,
)
from jobs.kernels.operator import Operator, Packed, Problem, Weight

TOLERANCE = 0.01  # Largest error over largest output, above bfloat16's rounding of activations.
_PROBE_ROWS = (1, 5, 32)
_TIMED_ROWS = (1, 32)
_ROUNDS = 20
_TIMING_S = 0.5  # after that no further round is begun
_CLEARLY = 1.25
_OPERATORS: tuple[Operator, ...] = (
    *dense.OPERATORS,
    *w8a8.OPERATORS,
    *fp8.OPERATORS,
    *w8a16.OPERATORS,
    *w4a16.OPERATORS,
    *w4a8.OPERATORS,
)


def available(scheme: Scheme, device: torch.device | str = "cpu") -> list[str]:
    """Return the names of operators of a format that can run on a device at all."""
    layout = Layout(scheme, DEFAULT_GROUP_SIZE if scheme in GROUPED else None)
    probe = Problem(layout, 256, 256, torch.float32, torch.device(device))
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

    The time is the geometric mean of the shortest at 1 and 32 rows; of near ties the first in the
    order of preference is taken, and an only choice is not timed. An operator whose result is off
    by more than `TOLERANCE` at 1, 5 or 32 rows is refused, and so is one whose rows are not exact
    (see `Operator`) behind one whose rows are. The answer is kept in the user's cache,
    per number of threads, for the same CPU and builds.
    """
    if scheme in GROUPED:
        group_size = group_size or min(DEFAULT_GROUP_SIZE, in_features)
    layout = Layout(scheme, group_size if scheme in GROUPED else None)
    problem = Problem(layout, out_features, in_features, dtype, torch.device(device))
    return _choose(problem, torch.get_num_threads())


@functools.cache
def _choose(problem: Problem, num_threads: int) -> Choice:
    remembered = choices.recall(problem, num_threads)
    if remembered is not None:
        return remembered
    choice = _measure(problem)
    choices.remember(problem, num_threads, choice)
    return choice


def _measure(problem: Problem) -> Choice:
    weight, x_NI, expected_NO = _probe(problem)
    right: dict[str, list[Callable[[], Tensor]]] = {}
    refused: dict[str, str] = {}
    has_exact_rows = False
    for operator in _OPERATORS:
        # The plain arithmetic comes last, and is for where nothing else is right.
        if operator.scheme != problem.layout.scheme or (right and operator.name == reference.NAME):
            continue
        reason = operator.refuses(problem)
        if reason is None and has_exact_rows and not operator.has_exact_rows:
            reason = "the last bits of a row depend on the rows beside it"
        if reason is None:
            packed = operator.pack(weight, problem)
            reason = _wrong(operator, packed, problem, x_NI, expected_NO)
        if reason is not None:
            refused[operator.name] = reason
            continue
        has_exact_rows |= operator.has_exact_rows  # Those that have come first.
        right[operator.name] = [
            functools.partial(operator.run, x_NI[:rows], packed, None, problem)
            for rows in _TIMED_ROWS
        ]
    assert right, f"the reference disagrees with itself: {refused}"
    microseconds = _time_us(right)
    # In order of preference: a near tie must not fall one way here and another way there.
    limit_us = _CLEARLY * min(microseconds.values())
    chosen = next(name for name, time_us in microseconds.items() if time_us <= limit_us)
    return Choice(chosen, microseconds, refused)


def _probe(problem: Problem) -> tuple[Weight, Tensor, Tensor]:
    """Return a weight and activations that look like a model's, and what they make in float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (problem.out_features, problem.in_features)
    weight_OI = torch.randn(shape, generator=generator) * 0.02
    x_NI = torch.randn((max(_PROBE_ROWS), problem.in_features), generator=generator)
    x_NI = x_NI.to(problem.device, problem.dtype)
    layout = problem.layout
    if layout.scheme == "bf16":
        weight_OI = weight_OI.to(problem.device, torch.bfloat16)
        return weight_OI, x_NI, functional.linear(x_NI.float(), weight_OI.float())
    groups, (_, high) = layout.num_groups(problem.in_features), value_range(layout.scheme)
    scale_OG = weight_OI.unflatten(1, (groups, -1)).abs().amax(dim=-1) / high
    weight = round_to_scale(weight_OI, scale_OG, layout).to(problem.device)
    return weight, x_NI, reference_linear(x_NI.float(), weight)


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


def _time_us(calls: dict[str, list[Callable[[], Tensor]]]) -> dict[str, float]:
    """Return the geometric mean of the shortest times of each operator's calls.

    The shortest, since what others do on the machine only ever adds; by turns, so that it adds to
    all alike; on one thread, since on a busy machine threads that wait for each other are late by
    a whole slice of time, which says nothing about an operator.
    """
    if len(calls) == 1:
        return {name: 0.0 for name in calls}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _shortest_us(calls)
    finally:
        torch.set_num_threads(num_threads)


def _shortest_us(calls: dict[str, list[Callable[[], Tensor]]]) -> dict[str, float]:
    shortest_us = {name: [math.inf] * len(own) for name, own in calls.items()}
    begin_s = time.perf_counter()
    for round_number in range(_ROUNDS):
        for name, own in calls.items():
            for index, call in enumerate(own):
                shortest_us[name][index] = min(shortest_us[name][index], _once_us(call))
        if round_number and time.perf_counter() - begin_s > _TIMING_S:
            break
    return {name: statistics.geometric_mean(times) for name, times in shortest_us.items()}


def _once_us(call: Callable[[], Tensor]) -> float:
    start_s = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return (time.perf_counter() - start_s) * 1e6
