"""How candidates are judged: who goes on to the next rung, who is shown to the gate, who passes.

Takes results of the tasks of one rung; gives numbers of candidates. Pure. Losses are compared in
pairs on the same sequences with the unchanged model's, candidate 0, which runs on every rung.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.errors import SearchError
from jobs.config import SearchConfig
from jobs.evaluation.gate import Measurement, Verdict, judge
from jobs.search.forecast import Forecast
from jobs.search.pareto import Point, ranks, shares, spread
from jobs.search.space import Assignment
from jobs.search.tasks import BASE, Result, Results, Task


def measure(config: SearchConfig, base_bytes: int, base: Result, found: Result) -> Measurement:
    """Return a candidate's measurement beside the unchanged model, from losses in pairs."""
    return Measurement.from_losses(
        np.asarray(base.losses),
        np.asarray(found.losses),
        config.gate,
        size_bytes=found.size_bytes,
        base_size_bytes=base_bytes,
        faults=found.faults,
        **dict(found.checks),
    )


def measurements(
    forecast: Forecast, rung: int, alive: Sequence[int], results: Results
) -> dict[int, Measurement]:
    """Return the measurements of a rung's candidates, but for those that could not be scored.

    Raises SearchError if the unchanged model, or every candidate, could not be scored.
    """
    config, base_bytes = forecast.space.config, forecast.space.base_bytes
    base = results[Task(stage="rung", rung=rung, number=BASE)]
    if base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    found = {each: results[Task(stage="rung", rung=rung, number=each)] for each in alive}
    scored = {
        each: measure(config, base_bytes, base, result)
        for each, result in found.items()
        if result.error is None
    }
    usable = {each: m for each, m in scored.items() if math.isfinite(m.perplexity_increase.point)}
    if not usable:
        errors = sorted({result.error for result in found.values() if result.error is not None})
        why = "; ".join(errors) or "every loss was infinite or not a number"
        raise SearchError(
            f"none of {len(alive)} candidates could be scored on rung {rung}: {why}. "
            "Correct the model or widen `schemes`."
        )
    return usable


def promote(
    forecast: Forecast,
    candidates: Sequence[Assignment],
    measured: Mapping[int, Measurement],
    keep_ratio: float,
) -> list[int]:
    """Return the candidates that go on, best first: a share of those that were measured.

    Of those that the limits do not rule out (by the lower bound of the perplexity increase: not yet
    shown to be too large) first those that together dominate most; then by non-dominated rank.
    Those ruled out follow by how little they exceed the limits. At least one goes on. Latencies are
    the kernels' table's: measured ones would differ from run to run.
    """
    points = {each: point_of(forecast, each, candidates[each], measured[each]) for each in measured}
    kept = max(1, math.ceil(keep_ratio * len(measured)))
    possible = [
        each for each in measured if not _excesses(forecast, candidates[each], measured[each])
    ]
    limits = forecast.space.config.gate
    places = spread([shares(points[each], limits) for each in possible], kept)
    first = [possible[place] for place in places]
    order = []
    for point, rank in zip(points.values(), ranks(list(points.values())), strict=True):
        each = point.candidate
        if rank is None or each in first:
            continue
        excess = sum(_excesses(forecast, candidates[each], measured[each]).values())
        order.append((excess, rank, point.size_ratio, point.perplexity_increase, each))
    return [*first, *(each for *_, each in sorted(order))][:kept]


def point_of(forecast: Forecast, number: int, assignment: Assignment, found: Measurement) -> Point:
    """Return a candidate's objectives: quality and bytes as measured, latency by the table."""
    return Point(
        candidate=number,
        perplexity_increase=found.perplexity_increase.point,
        size_ratio=found.size_ratio,
        latency_ratio=forecast.latency_ms(assignment) / forecast.base_ms,
    )


def finalists(
    forecast: Forecast, candidates: Sequence[Assignment], measured: Mapping[int, Measurement]
) -> list[int]:
    """Return the candidates to show to the gate, smallest first, then fastest.

    Bytes come before latency because they are exact: the order is the same on every machine. Where
    no candidate may keep to the limits it is the nearest alone, for its verdict.
    """

    def preference(number: int) -> tuple[float, float, float]:
        point = point_of(forecast, number, candidates[number], measured[number])
        return (point.size_ratio, point.latency_ratio or 1.0, point.perplexity_increase)

    possible = [
        each for each in measured if not _excesses(forecast, candidates[each], measured[each])
    ]
    if possible:
        return sorted(possible, key=preference)
    return promote(forecast, candidates, measured, keep_ratio=1e-9)


def verdict_of(config: SearchConfig, base_bytes: int, base: Result, result: Result) -> Verdict:
    """Return the gate's verdict on a candidate."""
    if result.error is not None:
        return Verdict(passed=False, reasons=(f"could not be measured: {result.error}",))
    return judge(measure(config, base_bytes, base, result), config.gate)


def _excesses(forecast: Forecast, assignment: Assignment, found: Measurement) -> dict[str, float]:
    """Return which limits a candidate is shown to exceed."""
    return forecast.excesses(assignment, found.perplexity_increase.lower)
