import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.config import GateConfig
from jobs.search.pareto import Point, front, hypervolume, ranks, spread, violation


def _point(candidate: int, increase: float, size: float, latency: float | None = None) -> Point:
    return Point(
        candidate=candidate, perplexity_increase=increase, size_ratio=size, latency_ratio=latency
    )


def test_front_when_some_are_dominated_keeps_the_others_smallest_first() -> None:
    points = [
        _point(0, 0.0, 1.0),
        _point(1, 0.01, 0.6),
        _point(2, 0.02, 0.7),  # worse than 1 in both
        _point(3, 0.05, 0.4),
    ]
    assert [point.candidate for point in front(points)] == [3, 1, 0]


def test_ranks_when_layers_of_fronts_exist_number_them() -> None:
    points = [_point(0, 0.1, 0.1), _point(1, 0.2, 0.2), _point(2, 0.3, 0.3), _point(3, 0.1, 0.1)]
    assert ranks(points) == [0, 1, 2, 0]


def test_ranks_when_a_number_is_not_finite_gives_none() -> None:
    assert ranks([_point(0, math.nan, 0.1), _point(1, 0.9, 0.9)]) == [None, 0]


def test_ranks_when_latency_decides_keeps_both() -> None:
    points = [_point(0, 0.1, 0.1, 2.0), _point(1, 0.2, 0.2, 1.0)]
    assert ranks(points) == [0, 0]


def test_ranks_when_a_latency_is_missing_ignores_all_latencies() -> None:
    points = [_point(0, 0.1, 0.1, 2.0), _point(1, 0.2, 0.2, None)]
    assert ranks(points) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_when_compared_with_the_definition_is_the_same(pairs: list[tuple[int, int]]) -> None:
    points = [_point(i, float(a), float(b)) for i, (a, b) in enumerate(pairs)]
    plain = {
        i
        for i, (a, b) in enumerate(pairs)
        if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in pairs)
    }
    assert {point.candidate for point in front(points)} == plain


def test_violation_when_within_limits_is_zero_else_the_relative_excess() -> None:
    limits = GateConfig(max_perplexity_increase=0.02, max_size_ratio=0.5, max_latency_ratio=1.0)
    assert violation(_point(0, 0.02, 0.5, 1.0), limits) == 0.0
    assert violation(_point(0, 0.04, 0.5, 1.5), limits) == pytest.approx(1.5)
    assert violation(_point(0, math.nan, 0.5), limits) == math.inf


def _monte_carlo(points: list[tuple[float, ...]], count: int = 20_000) -> float:
    samples = np.random.default_rng(0).random((count, len(points[0])))
    covered = np.zeros(count, bool)
    for point in points:
        covered |= (samples >= np.array(point)).all(axis=1)
    return float(covered.mean())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_hypervolume_when_points_are_many_is_the_share_that_they_dominate(dimensions: int) -> None:
    generator = np.random.default_rng(dimensions)
    points = [tuple(row) for row in generator.random((30, dimensions))]
    assert hypervolume(points) == pytest.approx(_monte_carlo(points), abs=0.012)


def test_hypervolume_when_a_point_is_beyond_the_worst_counts_nothing_of_it() -> None:
    assert hypervolume([(0.5, 1.0, 0.1), (float("nan"), 0.0, 0.0)]) == 0.0
    assert hypervolume([(0.5, 0.5, 0.5), (-1.0, 0.9, 0.9)]) == pytest.approx(0.125 + 0.5 * 0.01)


def test_spread_when_few_may_stay_takes_those_that_dominate_most() -> None:
    points = [(0.5, 0.5), (0.5, 0.6), (0.1, 0.9), (0.9, 0.1), (0.4, 0.55)]
    chosen = spread(points, 3)
    assert set(chosen) == {4, 2, 3} or set(chosen) == {0, 2, 3}
    assert hypervolume([points[i] for i in chosen]) == max(
        hypervolume([points[i] for i in each]) for each in combinations(range(5), 3)
    )


def test_spread_when_candidates_add_nothing_leaves_them_out() -> None:
    assert spread([(0.6, 0.6), (0.7, 0.5)], 2, taken=[(0.5, 0.5)]) == []
