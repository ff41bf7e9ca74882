"""How a search goes on: which tasks come next, who is promoted, who wins.

Takes the configuration and every result so far; gives the next tasks or the outcome. Pure, and a
function of the results alone: a search that was killed goes on by being asked again.

Candidate 0 is the unchanged model; it runs on every rung, because losses are compared in pairs on
the same sequences. After the last rung comes the gate, on data that no rung has seen.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.config import StrictModel
from cluster.errors import SearchError
from jobs.config import SearchConfig
from jobs.evaluation.gate import Measurement, Verdict, judge
from jobs.search.pareto import Point, ranks, violation

BASE = 0


class Task(StrictModel):
    """Score one candidate on one rung; rung number len(rungs) is the gate."""

    rung: int
    candidate: int


class Result(StrictModel):
    """What a task measured: mean losses in nats per token, one for every sequence.

    `error` says why a candidate could not be scored; its other fields are then empty.
    """

    losses: tuple[float, ...] = ()
    size_bytes: int = 0
    latency_ms: float | None = None
    base_latency_ms: float | None = None
    memory_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None


class Finish(StrictModel):
    """The end of a search: the winner, or None where every finalist was refused."""

    winner: int | None
    verdicts: dict[int, Verdict]
    finalists: tuple[int, ...]


Results = Mapping[Task, Result]


def decide(
    config: SearchConfig, num_candidates: int, base_bytes: int, results: Results
) -> list[Task] | Finish:
    """Return the tasks that are wanted now and have no result yet, or the end of the search.

    `num_candidates` counts candidate 0. `base_bytes` is what the unchanged model takes in bf16.
    Raises SearchError if the unchanged model, or every candidate, could not be scored.
    """
    alive = list(range(1, num_candidates))
    for rung in range(len(config.rungs)):
        wanted = [Task(rung=rung, candidate=each) for each in (BASE, *alive)]
        missing = [task for task in wanted if task not in results]
        if missing:
            return missing
        measured = _measurements(config, rung, alive, base_bytes, results)
        keep_ratio = config.rungs[rung].keep_ratio if rung + 1 < len(config.rungs) else 1.0
        alive = promote(config, measured, keep_ratio)
    return _pass_gate(config, _finalists(config, measured), base_bytes, results)


def promote(
    config: SearchConfig, measured: Mapping[int, Measurement], keep_ratio: float
) -> list[int]:
    """Return the candidates that go on, best first: a share of those that can be ranked.

    Those that the limits do not rule out come first (by the lower bound of their perplexity
    increase: not yet shown to be too large), then by non-dominated rank, then the smaller. Those
    ruled out follow by how little they exceed the limits. At least one goes on.
    """
    points = [point_of(candidate, found) for candidate, found in measured.items()]
    order = []
    for point, rank in zip(points, ranks(points), strict=True):
        if rank is None:
            continue
        excess = violation(_optimistic(point, measured[point.candidate]), config.gate)
        order.append((excess, rank, point.size_ratio, point.perplexity_increase, point.candidate))
    kept = math.ceil(keep_ratio * len(order))
    return [candidate for *_, candidate in sorted(order)[: max(1, kept)]]


def measure(config: SearchConfig, base_bytes: int, base: Result, found: Result) -> Measurement:
    """Return a candidate's measurement beside the unchanged model, from losses in pairs."""
    return Measurement.from_losses(
        np.asarray(base.losses),
        np.asarray(found.losses),
        config.gate,
        size_bytes=found.size_bytes,
        base_size_bytes=base_bytes,
        latency_ms=found.latency_ms,
        base_latency_ms=found.base_latency_ms,
    )


def point_of(candidate: int, found: Measurement) -> Point:
    """Return a measurement's place among the objectives."""
    return Point(
        candidate=candidate,
        perplexity_increase=found.perplexity_increase.point,
        size_ratio=found.size_ratio,
        latency_ratio=found.latency_ratio,
    )


def _measurements(
    config: SearchConfig, rung: int, alive: Sequence[int], base_bytes: int, results: Results
) -> dict[int, Measurement]:
    base = results[Task(rung=rung, candidate=BASE)]
    if base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    found = {each: results[Task(rung=rung, candidate=each)] for each in alive}
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


def _finalists(config: SearchConfig, measured: Mapping[int, Measurement]) -> list[int]:
    """Return the candidates to show to the gate, smallest first, then fastest.

    Bytes come before latency because they are exact: the order is the same on every machine.
    """

    def preference(candidate: int) -> tuple[float, float, float]:
        point = point_of(candidate, measured[candidate])
        latency = point.latency_ratio if point.latency_ratio is not None else 1.0
        return (point.size_ratio, latency, point.perplexity_increase)

    def is_possible(candidate: int) -> bool:
        point = point_of(candidate, measured[candidate])
        return violation(_optimistic(point, measured[candidate]), config.gate) == 0.0

    possible = [candidate for candidate in measured if is_possible(candidate)]
    if possible:
        return sorted(possible, key=preference)
    return promote(config, measured, keep_ratio=1e-9)  # the nearest alone, for its verdict


def _pass_gate(
    config: SearchConfig, finalists: Sequence[int], base_bytes: int, results: Results
) -> list[Task] | Finish:
    gate = len(config.rungs)
    base = results.get(Task(rung=gate, candidate=BASE))
    if base is not None and base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    verdicts: dict[int, Verdict] = {}
    for candidate in finalists:
        wanted = [Task(rung=gate, candidate=each) for each in (BASE, candidate)]
        result = results.get(wanted[1])
        if base is None or result is None:
            return [task for task in wanted if task not in results]
        verdicts[candidate] = _verdict(config, base_bytes, base, result)
        if verdicts[candidate].passed:
            return Finish(winner=candidate, verdicts=verdicts, finalists=tuple(finalists))
    return Finish(winner=None, verdicts=verdicts, finalists=tuple(finalists))


def _verdict(config: SearchConfig, base_bytes: int, base: Result, result: Result) -> Verdict:
    if result.error is not None:
        return Verdict(passed=False, reasons=(f"could not be measured: {result.error}",))
    return judge(measure(config, base_bytes, base, result), config.gate)


def _optimistic(point: Point, found: Measurement) -> Point:
    return point.replace(perplexity_increase=found.perplexity_increase.lower)
