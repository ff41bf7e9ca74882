import pytest
from search_fakes import answer, forecast, space

from jobs.evaluation.gate import Measurement
from jobs.search.forecast import Forecast
from jobs.search.rungs import finalists, measure, measurements, promote
from jobs.search.space import UNCHANGED, Assignment
from jobs.search.tasks import BASE, Task

SPACE = space(schemes=("bf16", "w8a8", "w4a16", "w3a16"))
NAMES = [choice.scheme for choice in SPACE.choices]
CANDIDATES: list[Assignment] = [
    UNCHANGED,
    *(SPACE.uniform(NAMES.index(scheme)) for scheme in ("w8a8", "w4a16", "w3a16")),
]


def _measured(known: Forecast) -> dict[int, Measurement]:
    results = {
        Task(stage="rung", number=n): answer(SPACE, Task(stage="rung", number=n), CANDIDATES)
        for n in range(len(CANDIDATES))
    }
    return measurements(known, 0, range(1, len(CANDIDATES)), results)


def test_promote_when_all_may_stay_puts_what_exceeds_a_limit_last() -> None:
    known = forecast(SPACE)
    order = promote(known, CANDIDATES, _measured(known), keep_ratio=1.0)
    assert set(order) == {1, 2, 3}
    assert order[-1] == 3  # 0.24 nats more


def test_promote_when_the_share_is_tiny_keeps_one() -> None:
    known = forecast(SPACE)
    assert len(promote(known, CANDIDATES, _measured(known), keep_ratio=1e-9)) == 1


def test_finalists_when_several_are_possible_are_shown_smallest_first() -> None:
    known = forecast(SPACE)
    assert finalists(known, CANDIDATES, _measured(known)) == [2, 1]


def test_finalists_when_none_is_possible_is_the_nearest_alone() -> None:
    known = forecast(SPACE)
    worst = {3: _measured(known)[3]}
    assert finalists(known, CANDIDATES, worst) == [3]


def test_measurements_when_losses_are_infinite_leave_the_candidate_out() -> None:
    known = forecast(SPACE)
    results = {
        Task(stage="rung", number=n): answer(SPACE, Task(stage="rung", number=n), CANDIDATES)
        for n in range(len(CANDIDATES))
    }
    broken = Task(stage="rung", number=1)
    results[broken] = results[broken].replace(losses=(float("inf"),) * 8)
    assert set(measurements(known, 0, (1, 2, 3), results)) == {2, 3}


def test_measure_when_losses_rise_evenly_has_no_spread() -> None:
    base, found = (answer(SPACE, Task(stage="rung", number=n), CANDIDATES) for n in (BASE, 1))
    interval = measure(SPACE.config, SPACE.base_bytes, base, found).perplexity_increase
    assert interval.lower == pytest.approx(interval.upper)
    assert interval.point == pytest.approx(0.0030, abs=1e-4)
