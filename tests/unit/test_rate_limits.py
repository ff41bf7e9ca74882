import random

import pytest
from ledger_fakes import Clock

from cluster.accounting import Limits
from serving.gateway.errors import RefusedError
from serving.gateway.rate_limits import Asked, Bound, RateLimits, Taken
from serving.messages import Refused

TEAM = "team `a`"


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.25)


@pytest.fixture
def rates(clock: Clock) -> RateLimits:
    return RateLimits(clock)


def take(rates: RateLimits, tokens: int = 1, choices: int = 1, **limits: int) -> Taken:
    return rates.take([Bound(TEAM, Limits(**limits))], Asked(tokens, choices))


def refusal(rates: RateLimits, tokens: int = 1, choices: int = 1, **limits: int) -> Refused:
    with pytest.raises(RefusedError) as caught:
        take(rates, tokens, choices, **limits)
    return caught.value.refused


def test_take_when_nothing_is_limited_always_succeeds(rates: RateLimits):
    for _ in range(1000):
        take(rates, tokens=10**9, choices=8)


def test_requests_when_over_the_limit_are_429_with_the_time_to_wait(
    rates: RateLimits, clock: Clock
):
    take(rates, requests_per_min=2)
    clock.now_s += 10
    take(rates, requests_per_min=2)
    refused = refusal(rates, requests_per_min=2)
    assert refused.status == 429
    assert (refused.code, refused.retry_after_s) == ("rate_limit_exceeded", 51)
    assert f"{TEAM} may use 2 requests a minute: 2 are taken" in refused.message
    clock.now_s += refused.retry_after_s
    take(rates, requests_per_min=2)


def test_tokens_when_released_unused_are_free_again(rates: RateLimits):
    first = take(rates, tokens=90, tokens_per_min=100)
    assert "tokens a minute: 90 are taken" in refusal(rates, 11, tokens_per_min=100).message
    first.release(used_tokens=20)
    take(rates, tokens=80, tokens_per_min=100)
    refusal(rates, 1, tokens_per_min=100)


def test_tokens_when_released_after_their_minute_change_nothing(rates: RateLimits, clock: Clock):
    first = take(rates, tokens=90, tokens_per_min=100)
    clock.now_s += 120
    take(rates, tokens=100, tokens_per_min=100)
    first.release(used_tokens=0)
    refusal(rates, 1, tokens_per_min=100)


def test_choices_when_released_are_free_again(rates: RateLimits):
    first = take(rates, choices=3, max_choices=4)
    assert refusal(rates, choices=2, max_choices=4).retry_after_s == 1
    first.release(used_tokens=1)
    take(rates, choices=4, max_choices=4)


@pytest.mark.parametrize("limits", [{"tokens_per_min": 10}, {"max_choices": 10}])
def test_take_when_it_can_never_be_is_400(rates: RateLimits, limits: dict[str, int]):
    refused = refusal(rates, tokens=11, choices=11, **limits)
    assert (refused.status, refused.retry_after_s) == (400, None)
    assert "at most 10" in refused.message


def test_take_when_one_bound_refuses_counts_against_none(rates: RateLimits):
    key = Bound("key `k`", Limits(requests_per_min=5))
    team = Bound(TEAM, Limits(requests_per_min=1))
    take(rates, requests_per_min=1)
    for _ in range(9):
        with pytest.raises(RefusedError, match=TEAM):
            rates.take([key, team], Asked(1, 1))
    for _ in range(5):
        rates.take([key], Asked(1, 1))


def test_take_when_undone_leaves_nothing(rates: RateLimits):
    limits = {"requests_per_min": 1, "tokens_per_min": 10, "max_choices": 1}
    for _ in range(5):
        take(rates, tokens=10, **limits).undo()
    take(rates, tokens=10, **limits)


def test_take_when_random_never_exceeds_the_limit_in_any_minute(rates: RateLimits, clock: Clock):
    rng, granted = random.Random(1), []
    for _ in range(3000):
        clock.now_s += rng.random()
        tokens = rng.randint(1, 40)
        try:
            take(rates, tokens, tokens_per_min=100)
        except RefusedError:
            continue
        granted.append((clock.now_s, tokens))
    assert len(granted) > 100
    for end_s, _ in granted:
        assert sum(tokens for at_s, tokens in granted if end_s - 60 < at_s <= end_s) <= 100
