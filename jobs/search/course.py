"""The course of a search: which tasks come next, which candidates there are, how it ends.

Takes a space and every result so far; gives the tasks that are wanted now, or the end. Pure, and a
function of the results alone: a search that was killed goes on by being asked again.

First the kernels are timed, then each choice of each group is measured alone. From these come the
first candidates, and from their results on the first rung further ones. A share goes on from rung
to rung; requests of what is left are timed, one model at a time; then comes the gate, on data that
no rung has seen, and at last some of the front are timed through Ray Serve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import SearchError
from jobs.evaluation.gate import Verdict
from jobs.search.forecast import Forecast, check_limits
from jobs.search.predictor import Predictor
from jobs.search.proposals import propose
from jobs.search.rungs import (
    Standing,
    base_result,
    finalists,
    promote,
    standing_on,
    verdict_of,
)
from jobs.search.space import UNCHANGED, Assignment, Space
from jobs.search.tasks import Results, Stage, Task

_TIMES = Task(stage="times")
_WORST_RISE = 100.0  # Nats per token: far beyond guessing, for what is no number.


@dataclass(frozen=True)
class Wanted:
    """Tasks without a result, and the candidates so far, the unchanged model first."""

    candidates: tuple[Assignment, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Finish:
    """The end: the winner, or None where every finalist was refused."""

    candidates: tuple[Assignment, ...]
    forecast: Forecast
    winner: Assignment | None
    verdicts: dict[Assignment, Verdict]
    front: tuple[Assignment, ...]


def decide(space: Space, results: Results) -> Wanted | Finish:
    """Return the tasks that are wanted now and have no result yet, or the end of the search.

    Raises SearchError if the unchanged model, or every candidate, could not be scored, ConfigError
    if no candidate can keep to the limits on bytes, memory, latency and cost.
    """
    candidates: list[Assignment] = [UNCHANGED]
    for stage in ([_TIMES], _probes(space)):
        if missing := _missing(stage, results):
            return Wanted(tuple(candidates), missing)
        _check_measured(stage, results)
    forecast = alone = first_forecast(space, results)
    check_limits(forecast)
    for generation in range(space.config.generations):
        scored = _rises(candidates, results) if generation else {UNCHANGED: 0.0}
        count = _size(space.config.num_trials, space.config.generations, generation)
        candidates += propose(forecast, count, scored, generation)
        if missing := _missing(_tasks("rung", candidates), results):
            return Wanted(tuple(candidates), missing)
        scored = _rises(candidates, results)
        refitted = alone.predictor.refitted(space, list(scored), list(scored.values()))
        forecast = alone.with_predictor(refitted)
    return _climb(forecast, tuple(candidates), results)


def first_forecast(space: Space, results: Results) -> Forecast:
    """Return what is known once kernels are timed and choices measured alone."""
    times = results[_TIMES].times
    assert times is not None, "checked before"
    found = np.array([results[task].divergences for task in _probes(space)])
    rises_SC = np.where(np.isfinite(found), found, _WORST_RISE)
    return Forecast.of(space, times, Predictor(rises_SC))


def _check_measured(tasks: Sequence[Task], results: Results) -> None:
    errors = {found.error for task in tasks if (found := results[task]).error is not None}
    if errors:
        what = "the kernels could not be timed" if tasks[0] == _TIMES else "no choice was measured"
        raise SearchError(f"{what}: {'; '.join(sorted(map(str, errors)))}")


def _climb(
    forecast: Forecast, candidates: tuple[Assignment, ...], results: Results
) -> Wanted | Finish:
    """Go on through the rungs, requests, the gate and Ray Serve."""
    config, alive = forecast.space.config, list(candidates[1:])
    for rung in range(len(config.rungs)):
        if missing := _missing(_tasks("rung", [UNCHANGED, *alive], rung), results):
            return Wanted(candidates, missing)
        standing = standing_on(forecast, rung, alive, results)
        if rung + 1 < len(config.rungs):
            alive = promote(standing, config.rungs[rung].keep_ratio)
    if missing := _missing(_tasks("request", list(standing.measured)), results):
        return Wanted(candidates, missing)
    judged = _pass_gate(candidates, standing, results)
    if isinstance(judged, Wanted):
        return judged
    winner, verdicts = judged
    front = standing.front()
    if winner is not None and config.served_finalists:
        served = list(dict.fromkeys([winner, *front]))[: config.served_finalists]
        if missing := _missing(_tasks("serve", served), results):
            return Wanted(candidates, missing)
    return Finish(candidates, forecast, winner, verdicts, tuple(front))


def _pass_gate(
    candidates: tuple[Assignment, ...], standing: Standing, results: Results
) -> Wanted | tuple[Assignment | None, dict[Assignment, Verdict]]:
    base_task = Task(stage="gate")
    if missing := _missing([base_task], results):
        return Wanted(candidates, missing)
    base = results[base_task]
    if base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    verdicts: dict[Assignment, Verdict] = {}
    shown = finalists(standing)
    for each in shown:
        if missing := _missing(_tasks("gate", [each]), results):
            return Wanted(candidates, missing)
        found = results[Task(stage="gate", assignment=each)]
        request = results[Task(stage="request", assignment=each)]
        verdicts[each] = verdict_of(standing.forecast, base, found, request, len(shown))
        if verdicts[each].passed:
            return each, verdicts
    return None, verdicts


def _rises(candidates: Sequence[Assignment], results: Results) -> dict[Assignment, float]:
    """Return how much the mean loss on the first rung rose; infinite where it was not scored."""
    base = base_result(results)
    found: dict[Assignment, float] = {}
    for assignment in candidates:
        result = results[Task(stage="rung", assignment=assignment)]
        rise = math.inf
        if result.error is None:
            rise = float(np.mean(np.asarray(result.losses) - np.asarray(base.losses)))
        found[assignment] = rise if math.isfinite(rise) else math.inf
    return found


def _probes(space: Space) -> list[Task]:
    return [Task(stage="probe", group=group) for group in range(len(space.groups))]


def _tasks(stage: Stage, assignments: Sequence[Assignment], rung: int = 0) -> list[Task]:
    return [Task(stage=stage, rung=rung, assignment=each) for each in assignments]


def _missing(tasks: Sequence[Task], results: Results) -> tuple[Task, ...]:
    return tuple(task for task in tasks if task not in results)


def _size(num_trials: int, generations: int, generation: int) -> int:
    """Return how many candidates a generation proposes; the first ones take what is left over."""
    whole, rest = divmod(num_trials, generations)
    return whole + (generation < rest)
