"""What is expected of a served model comes from the table and from others, never from itself."""

import random

import pytest

from jobs.search.serving_share import Served, expected_ms

BASE_MS, ADDED_MS = 100.0, 20.0


def served(table_ms: float, slower: float = 1.0, noise: float = 1.0) -> Served:
    """Return what a model takes where Serve adds 20 ms, on a machine that is so much slower."""
    served_ms = noise * slower * (table_ms + ADDED_MS)
    return Served(table_ms, served_ms, slower * (BASE_MS + ADDED_MS))


def test_expected_when_others_were_served_tells_a_slow_machine_from_what_serve_adds() -> None:
    others = [served(table_ms, 1.3) for table_ms in (40.0, 45.0, 50.0, 60.0)]
    one = served(50.0, 1.3)
    found = expected_ms(one.table_ms, BASE_MS, one.base_served_ms, others)
    assert found == pytest.approx(one.served_ms, rel=0.02)
    assert expected_ms(one.table_ms, BASE_MS, one.base_served_ms, []) > 1.1 * one.served_ms


def test_expected_when_there_are_no_others_takes_all_for_serves() -> None:
    assert expected_ms(50.0, BASE_MS, 130.0, []) == pytest.approx(80.0)


def test_expected_when_the_only_other_is_as_slow_and_noisy_stays_near_that_of_none() -> None:
    alone = expected_ms(50.0, BASE_MS, 120.0, [])
    for noise in (0.97, 1.03):
        others = [served(90.0, noise=noise)]
        assert expected_ms(50.0, BASE_MS, 120.0, others) == pytest.approx(alone, rel=0.06)


def test_expected_when_others_are_noisy_is_within_a_twentieth() -> None:
    generator = random.Random(0)
    others = [
        served(table_ms, generator.uniform(1.0, 1.4), generator.uniform(0.95, 1.05))
        for table_ms in (40.0, 50.0, 55.0, 60.0, 70.0, 80.0, 90.0)
    ]
    for table_ms in (40.0, 60.0, 90.0):
        one = served(table_ms, 1.2)
        found = expected_ms(table_ms, BASE_MS, one.base_served_ms, others)
        assert found == pytest.approx(one.served_ms, rel=0.05)


def test_expected_when_a_slow_turn_would_make_serve_add_less_than_nothing_adds_nothing() -> None:
    others = [Served(table_ms=90.0, served_ms=30.0, base_served_ms=100.0)]
    assert expected_ms(50.0, BASE_MS, 100.0, others) == pytest.approx(50.0)
