"""The course of a search: which tasks come next, which candidates there are, how it ends.

Takes a space and every result so far; gives the tasks that are wanted now, or the end. Pure, and a
function of the results alone: a search that was killed goes on by being asked again.

First the kernels are timed, then each choice of each group is measured alone. From these come the
first candidates, and from their results on the first rung further ones. A share goes on from rung
to rung; after the last one comes the gate, on data that no rung has seen, and at last some of the
front are timed through Ray Serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import SearchError
from jobs.evaluation.gate import Verdict
from jobs.search.forecast import Forecast, check_limits
from jobs.search.pareto import shares, spread
from jobs.search.predictor import Predictor
from jobs.search.proposals import knapsack_front, propose, uniform_assignments
from jobs.search.rungs import finalists, measurements, point_of, promote, verdict_of
from jobs.search.space import UNCHANGED, Assignment, Space
from jobs.search.tasks import BASE, Results, Task

_TIMES = Task(stage="times")


@dataclass(frozen=True)
class Wanted:
    """Tasks without a result; candidates are numbered by their place."""

    candidates: tuple[Assignment, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Finish:
    """The end: the winner, or None where every finalist was refused."""

    candidates: tuple[Assignment, ...]
    forecast: Forecast
    winner: int | None
    verdicts: dict[int, Verdict]
    finalists: tuple[int, ...]
    front: tuple[int, ...]


def decide(space: Space, results: Results) -> Wanted | Finish:
    """Return the tasks that are wanted now and have no result yet, or the end of the search.

    Raises SearchError if the unchanged model, or every candidate, could not be scored, ConfigError
    if no candidate can keep to the limits on bytes, memory, latency and cost.
    """
    candidates: list[Assignment] = [UNCHANGED]
    if missing := _missing([_TIMES, *_probes(space)], results):
        return Wanted((UNCHANGED,), (missing[0],) if missing[0] == _TIMES else tuple(missing))
    forecast = alone = first_forecast(space, results)
    check_limits(forecast, [*knapsack_front(forecast), *uniform_assignments(space)])
    for generation in range(space.config.generations):
        scored = _rises(space, candidates, results) if generation else {UNCHANGED: 0.0}
        count = _size(space.config.num_trials, space.config.generations, generation)
        candidates += propose(forecast, count, scored, generation)
        if missing := _missing(_on_rung(0, range(len(candidates))), results):
            return Wanted(tuple(candidates), tuple(missing))
        scored = _rises(space, candidates, results)
        refitted = alone.predictor.refitted(space, list(scored), list(scored.values()))
        forecast = alone.with_predictor(refitted)
    return _climb(forecast, candidates, results)


def _climb(
    forecast: Forecast, candidates: Sequence[Assignment], results: Results
) -> Wanted | Finish:
    """Go on through the rungs, the gate and Ray Serve."""
    config, alive = forecast.space.config, list(range(1, len(candidates)))
    last = len(config.rungs) - 1
    for rung in range(len(config.rungs)):
        if missing := _missing(_on_rung(rung, (BASE, *alive)), results):
            return Wanted(tuple(candidates), tuple(missing))
        measured = measurements(forecast, rung, alive, results)
        keep_ratio = config.rungs[rung].keep_ratio if rung < last else 1.0
        alive = promote(forecast, candidates, measured, keep_ratio)
    points = {each: point_of(forecast, each, candidates[each], measured[each]) for each in measured}
    order = spread([shares(point, config.gate) for point in points.values()], len(points))
    front = [list(points)[place] for place in order]
    end = _pass_gate(forecast, candidates, finalists(forecast, candidates, measured), results)
    if isinstance(end, Wanted):
        return end
    winner, verdicts, shown = end
    if winner is not None and config.served_finalists:
        served = list(dict.fromkeys([winner, *front]))[: config.served_finalists]
        wanted = [Task(stage="serve", number=each) for each in (BASE, *served)]
        if missing := _missing(wanted, results):
            return Wanted(tuple(candidates), tuple(missing))
    return Finish(tuple(candidates), forecast, winner, verdicts, tuple(shown), tuple(front))


def _pass_gate(
    forecast: Forecast, candidates: Sequence[Assignment], shown: Sequence[int], results: Results
) -> Wanted | tuple[int | None, dict[int, Verdict], Sequence[int]]:
    config, base_bytes = forecast.space.config, forecast.space.base_bytes
    base = results.get(Task(stage="gate", number=BASE))
    if base is not None and base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    verdicts: dict[int, Verdict] = {}
    for number in shown:
        wanted = [Task(stage="gate", number=each) for each in (BASE, number)]
        if base is None or wanted[1] not in results:
            return Wanted(tuple(candidates), tuple(_missing(wanted, results)))
        verdicts[number] = verdict_of(config, base_bytes, base, results[wanted[1]])
        if verdicts[number].passed:
            return number, verdicts, shown
    return None, verdicts, shown


def first_forecast(space: Space, results: Results) -> Forecast:
    """Return what is known once kernels are timed and choices measured alone.

    Raises SearchError where that failed.
    """
    times = results[_TIMES].times
    if times is None:
        raise SearchError(f"the kernels could not be timed: {results[_TIMES].error}")
    probed = [results[task] for task in _probes(space)]
    if errors := sorted({found.error for found in probed if found.error is not None}):
        raise SearchError(f"choices could not be measured alone: {'; '.join(errors)}")
    rises_SC = np.array([found.divergences for found in probed])
    return Forecast.of(space, times, Predictor(rises_SC))


def _rises(
    space: Space, candidates: Sequence[Assignment], results: Results
) -> dict[Assignment, float]:
    """Return how much the mean loss on the first rung rose; infinite where it was not scored."""
    base = results[Task(stage="rung", number=BASE)]
    if base.error is not None:
        raise SearchError(f"the unchanged model could not be scored: {base.error}")
    found: dict[Assignment, float] = {}
    for number, assignment in enumerate(candidates):
        result = results[Task(stage="rung", number=number)]
        rise = np.inf
        if result.error is None:
            rise = float(np.mean(np.asarray(result.losses) - np.asarray(base.losses)))
        found[assignment] = rise
    return found


def _probes(space: Space) -> list[Task]:
    return [Task(stage="probe", number=group) for group in range(len(space.groups))]


def _on_rung(rung: int, numbers: Sequence[int]) -> list[Task]:
    return [Task(stage="rung", rung=rung, number=number) for number in numbers]


def _missing(tasks: Sequence[Task], results: Results) -> list[Task]:
    return [task for task in tasks if task not in results]


def _size(num_trials: int, generations: int, generation: int) -> int:
    """Return how many candidates a generation proposes; the first ones take what is left over."""
    whole, rest = divmod(num_trials, generations)
    return whole + (generation < rest)
