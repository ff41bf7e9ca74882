"""How candidates are judged: who goes on to the next rung, who is shown to the gate, who passes.

Takes results of the tasks of one rung; gives assignments. Pure. Losses are compared in pairs on the
same sequences with the unchanged model's, which is measured on every rung.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import SearchError
from jobs.config import SearchConfig
from jobs.evaluation.gate import Measurement, Verdict, judge
from jobs.search.forecast import Forecast, excesses, limits_of, measured_values, name_of
from jobs.search.pareto import Point, ranks, shares, spread
from jobs.search.space import Assignment
from jobs.search.tasks import Result, Results, Task

# So many are shown to the gate at most; its bound is widened for as many.
MOST_FINALISTS = 4
_OF_GATE = ("max_perplexity_increase", "max_size_ratio", "max_latency_ratio")

Measurements = Mapping[Assignment, Measurement]


@dataclass(frozen=True)
class Standing:
    """A rung's candidates as they were measured, and what is known of the space."""

    forecast: Forecast
    measured: Measurements
    has_real_methods: bool
    """Whether weights were changed by the methods that the winner will have."""

    def point(self, assignment: Assignment) -> Point:
        """Return objectives: quality and bytes as measured, latency by the kernels' table.

        Measured latencies would differ from run to run, and with them who goes on.
        """
        found = self.measured[assignment]
        return Point(
            perplexity_increase=found.perplexity_increase.point,
            size_ratio=found.size_ratio,
            latency_ratio=self.forecast.latency_ms(assignment) / self.forecast.base_ms,
        )

    def excesses(self, assignment: Assignment) -> dict[str, float]:
        """Return which limits a candidate is shown to exceed, by the lower bound of its quality.

        Where plainer methods stood in for those of the winner, quality rules nothing out.
        """
        lower = self.measured[assignment].perplexity_increase.lower
        return self.forecast.excesses(assignment, lower if self.has_real_methods else None)

    def front(self) -> list[Assignment]:
        """Return what no other candidate dominates, those first that together dominate most."""
        everyone = list(self.measured)
        points = [self.point(each) for each in everyone]
        best = [e for e, rank in zip(everyone, ranks(points), strict=True) if rank == 0]
        limits = self.forecast.space.config.gate
        order = spread([shares(self.point(each), limits) for each in best], len(best))
        first = [best[place] for place in order]
        return [*first, *(each for each in best if each not in first)]


def measure(
    config: SearchConfig, base_bytes: int, base: Result, found: Result, num_judged: int = 1
) -> Measurement:
    """Return a candidate's measurement beside the unchanged model, from losses in pairs."""
    return Measurement.from_losses(
        np.asarray(base.losses),
        np.asarray(found.losses),
        config.gate,
        num_judged=num_judged,
        size_bytes=found.size_bytes,
        base_size_bytes=base_bytes,
        faults=found.faults,
        **dict(found.checks),
    )


def standing_on(
    forecast: Forecast, rung: int, alive: Sequence[Assignment], results: Results
) -> Standing:
    """Return a rung's candidates, but for those that could not be scored.

    Raises SearchError if the unchanged model, or every candidate, could not be scored.
    """
    config, base_bytes = forecast.space.config, forecast.space.base_bytes
    base = base_result(results, rung)
    found = {each: results[Task(stage="rung", rung=rung, assignment=each)] for each in alive}
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
    is_real = config.rungs[rung].real or forecast.space.has_plain_methods
    return Standing(forecast, usable, is_real)


def base_result(results: Results, rung: int = 0) -> Result:
    """Return the unchanged model's result on a rung; SearchError if it could not be scored."""
    base = results[Task(stage="rung", rung=rung)]
    if base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    return base


def promote(standing: Standing, keep_ratio: float) -> list[Assignment]:
    """Return the candidates that go on, best first: a share of those that were measured.

    Of those that the limits do not rule out first those that together dominate most; then by
    non-dominated rank. Those ruled out follow by how little they exceed the limits. At least one
    goes on.
    """
    everyone = list(standing.measured)
    kept = max(1, math.ceil(keep_ratio * len(everyone)))
    possible = [each for each in everyone if not standing.excesses(each)]
    limits = standing.forecast.space.config.gate
    places = spread([shares(standing.point(each), limits) for each in possible], kept)
    first = [possible[place] for place in places]
    points = [standing.point(each) for each in everyone]
    order = []
    for each, point, rank in zip(everyone, points, ranks(points), strict=True):
        if rank is None or each in first:
            continue
        excess = sum(standing.excesses(each).values())
        order.append((excess, rank, point.size_ratio, point.perplexity_increase, each))
    return [*first, *(each for *_, each in sorted(order))][:kept]


def finalists(standing: Standing) -> list[Assignment]:
    """Return the candidates to show to the gate, smallest first, then fastest.

    Only the smallest few of those whose quality was seen to be within the limit, and after them of
    those that may be. Bytes come before latency because they are exact: the order is the same on
    every machine. Where no candidate may keep to the limits it is the nearest alone, for its
    verdict.
    """
    limit = standing.forecast.space.config.gate.max_perplexity_increase

    def preference(assignment: Assignment) -> tuple[bool, float, float, Assignment]:
        point = standing.point(assignment)
        is_doubtful = standing.measured[assignment].perplexity_increase.upper > limit
        return (is_doubtful, point.size_ratio, point.latency_ratio or 1.0, assignment)

    possible = [each for each in standing.measured if not standing.excesses(each)]
    if possible:
        return sorted(possible, key=preference)[:MOST_FINALISTS]
    return promote(standing, keep_ratio=1e-9)


def verdict_of(
    forecast: Forecast, base: Result, found: Result, request: Result, num_judged: int
) -> Verdict:
    """Return the gate's verdict on a candidate, and the search's own limits' on its request."""
    if found.error is not None:
        return Verdict(passed=False, reasons=(f"could not be measured: {found.error}",))
    space = forecast.space
    measured = measure(space.config, space.base_bytes, base, found, num_judged)
    verdict = judge(measured, space.config.gate)
    limits = {name: limit for name, limit in limits_of(space).items() if name not in _OF_GATE}
    values = measured_values(space, found, request)
    broken = tuple(
        f"{name_of(name)}: {values[name]:,.4g}, the limit {limits[name]:,.4g}"
        for name in excesses(values, limits)
    )
    return verdict.replace(passed=verdict.passed and not broken, reasons=verdict.reasons + broken)
