"""What is expected of a served model comes from the table and from others, never from itself."""

import pytest

from jobs.search.serving_share import Served, expected_ms

BASE_MS, ADDED_MS = 100.0, 20.0


def served(table_ms: float, slower: float = 1.0) -> Served:
    """Return what a model takes where Serve adds 20 ms, on a machine that is so much slower."""
    return Served(table_ms, slower * (table_ms + ADDED_MS), slower * (BASE_MS + ADDED_MS))


def test_expected_when_others_were_served_tells_a_slow_machine_from_what_serve_adds() -> None:
    others = [served(40.0, 1.2), served(60.0, 1.5), served(95.0)]
    one = served(50.0, 1.4)
    found = expected_ms(one.table_ms, BASE_MS, one.base_served_ms, others)
    assert found == pytest.approx(one.served_ms)


@pytest.mark.parametrize("others", [[], [served(99.0)]], ids=["none", "as slow"])
def test_expected_when_nothing_tells_them_apart_takes_all_for_serves(others: list[Served]) -> None:
    assert expected_ms(50.0, BASE_MS, 130.0, others) == pytest.approx(80.0)


def test_expected_when_a_slow_turn_would_make_serve_add_less_than_nothing_adds_nothing() -> None:
    others = [Served(table_ms=90.0, served_ms=50.0, base_served_ms=100.0)]
    assert expected_ms(50.0, BASE_MS, 120.0, others) == pytest.approx(60.0)
