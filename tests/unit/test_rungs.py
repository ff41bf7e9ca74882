import pytest
from search_fakes import answer, forecast, space

from jobs.search.rungs import Standing, finalists, measure, promote, standing_on
from jobs.search.space import UNCHANGED, Assignment
from jobs.search.tasks import Result, Task

SPACE = space(schemes=("bf16", "w8a8", "w4a16", "w3a16"))
NAMES = [choice.scheme for choice in SPACE.choices]
INT8, INT4, INT3 = (SPACE.uniform(NAMES.index(name)) for name in ("w8a8", "w4a16", "w3a16"))


def _results(*assignments: Assignment) -> dict[Task, Result]:
    tasks = [Task(stage="rung", assignment=each) for each in (UNCHANGED, *assignments)]
    return {task: answer(SPACE, task) for task in tasks}


def _standing(*assignments: Assignment) -> Standing:
    return standing_on(forecast(SPACE), 0, assignments, _results(*assignments))


def test_promote_when_all_may_stay_puts_what_exceeds_a_limit_last() -> None:
    order = promote(_standing(INT8, INT4, INT3), keep_ratio=1.0)
    assert set(order) == {INT8, INT4, INT3}
    assert order[-1] == INT3  # 0.12 nats more


def test_promote_when_the_share_is_tiny_keeps_one() -> None:
    assert len(promote(_standing(INT8, INT4, INT3), keep_ratio=1e-9)) == 1


def test_finalists_when_several_are_possible_are_shown_smallest_first() -> None:
    assert finalists(_standing(INT8, INT4, INT3)) == [INT4, INT8]


def test_finalists_when_none_is_possible_is_the_nearest_alone() -> None:
    assert finalists(_standing(INT3)) == [INT3]


def test_standing_when_losses_are_infinite_leaves_the_candidate_out() -> None:
    results = _results(INT8, INT4)
    broken = Task(stage="rung", assignment=INT8)
    results[broken] = results[broken].replace(losses=(float("inf"),) * 8)
    assert set(standing_on(forecast(SPACE), 0, (INT8, INT4), results).measured) == {INT4}


def test_front_when_a_candidate_is_worse_in_everything_leaves_it_out() -> None:
    front = _standing(INT8, INT4, INT3).front()
    assert INT8 in front
    assert INT4 in front


def test_measure_when_losses_rise_evenly_has_no_spread() -> None:
    base, found = (answer(SPACE, Task(stage="rung", assignment=a)) for a in (UNCHANGED, INT8))
    interval = measure(SPACE.config, SPACE.base_bytes, base, found).perplexity_increase
    assert interval.lower == pytest.approx(interval.upper)
    assert interval.point == pytest.approx(0.0030, abs=1e-4)
