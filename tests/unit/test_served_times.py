"""How many requests make a served time, and what a search says of it beside the others'."""

import pytest

from jobs.search.forecast import Forecast
from jobs.search.predictor import Predictor
from jobs.search.report import served_fields
from jobs.search.served import is_enough
from jobs.search.serving_share import Served, expected_ms
from jobs.search.tasks import Result, Task
from tests.unit.search_fakes import space, times

SPACE = space(schemes=("bf16", "w8a8", "w4a16"))
FORECAST = Forecast.of(SPACE, times(SPACE), Predictor(SPACE.saved_bytes_SC * 0.0))
NAMES = [choice.scheme for choice in SPACE.choices]
INT8, INT4, DENSE = (SPACE.uniform(NAMES.index(name)) for name in ("w8a8", "w4a16", "bf16"))


@pytest.mark.parametrize(
    ("num_timed", "elapsed_s", "enough"),
    [(40, 1.0, False), (41, 1.0, True), (4, 100.0, False), (5, 100.0, True), (5, 30.0, False)],
)
def test_is_enough_when_requests_are_slow_takes_fewer(
    num_timed: int, elapsed_s: float, *, enough: bool
) -> None:
    assert is_enough(num_timed, elapsed_s) is enough


def test_served_fields_when_several_were_served_expect_by_all_but_itself() -> None:
    results = {
        Task(stage="serve", assignment=INT8): Result(
            request_ms=30.0, base_request_ms=50.0, num_requests=41
        ),
        Task(stage="serve", assignment=INT4): Result(
            request_ms=35.0, base_request_ms=52.0, num_requests=41
        ),
        Task(stage="serve", assignment=DENSE): Result(error="it did not come up"),
        Task(stage="request", assignment=INT8): Result(request_ms=1.0, base_request_ms=2.0),
    }
    others = [Served(FORECAST.latency_ms(INT4), 35.0, 52.0)]
    assert served_fields(FORECAST, INT8, results) == {
        "served_ms": 30.0,
        "predicted_served_ms": expected_ms(
            FORECAST.latency_ms(INT8), FORECAST.base_ms, 50.0, others
        ),
        "base_served_ms": 50.0,
        "served_requests": 41,
    }
    assert served_fields(FORECAST, DENSE, results) == {}
