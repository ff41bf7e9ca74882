import pytest

from serving.outcomes import Outcomes, count_above, quantile_s, total


def counted(*times_s: float) -> Outcomes:
    outcomes = Outcomes()
    for time_s in times_s:
        outcomes.add_first_token(time_s)
        outcomes.ended(is_failed=False)
    return outcomes


@pytest.mark.parametrize("time_s", [0.0002, 0.003, 0.05, 1.0, 60.0])
def test_quantile_when_all_times_are_equal_is_within_a_tenth_above(time_s: float):
    assert time_s <= quantile_s(counted(time_s).first_token, 0.5) * 1.001 <= time_s * 1.11


def test_quantile_when_nothing_was_counted_is_none():
    assert quantile_s({}, 0.5) is None


def test_quantile_when_times_differ_takes_the_asked_share():
    buckets = counted(*[0.01] * 95, *[1.0] * 5).first_token
    assert quantile_s(buckets, 0.5) < 0.02
    assert quantile_s(buckets, 0.99) > 0.9


def test_total_when_gateways_are_added_counts_all():
    both = total([counted(0.1, 0.2), counted(0.1)])
    assert (both.num_requests, sum(both.first_token.values())) == (3, 3)


def test_since_when_something_was_added_gives_only_that():
    before = counted(0.1, 0.2)
    after = total([before, counted(5.0)])
    after.num_failed += 1
    added = after.since(before)
    assert (added.num_requests, added.num_failed) == (1, 1)
    assert list(added.first_token.values()) == [1]


def test_count_above_when_times_differ_counts_the_longer_ones():
    buckets = counted(0.01, 0.1, 0.1, 1.0).first_token
    assert [count_above(buckets, limit_s) for limit_s in (0.001, 0.05, 0.5, 2.0)] == [4, 3, 1, 0]
