import pytest

from serving.directory import EXPIRY_S
from serving.outcomes import Outcomes, total
from serving.rollout import Absence, Observation, RolloutLimits, RolloutState, at_least, decide

LIMITS = RolloutLimits(watch_s=60, min_requests=50, min_compared=8)
CANARY = RolloutState.CANARY


def outcomes(num: int, failed: int = 0, first_s: float = 0.05, between_s: float = 0.02) -> Outcomes:
    result = Outcomes(num, failed)
    for _ in range(num - failed):
        result.add_first_token(first_s)
        result.add_between_tokens(between_s)
    return result


def seen(**changes) -> Observation:
    """Return an observation that is good in every way, with changes."""
    good = {
        "elapsed_s": 61.0,
        "canary": outcomes(60),
        "baseline": outcomes(500),
        "num_compared": 10,
    }
    return Observation(**{**good, **changes})


def test_decide_when_parity_holds_begins_the_canary():
    assert decide(RolloutState.CHECKING, Observation(parity=1.0), LIMITS).state is CANARY


def test_decide_when_parity_fails_rolls_back_and_says_by_how_much():
    decision = decide(RolloutState.CHECKING, Observation(parity=0.5), LIMITS)
    assert decision.state is RolloutState.ROLLED_BACK
    assert "50%" in decision.reason


def test_decide_when_nothing_is_compared_begins_the_canary():
    decision = decide(RolloutState.CHECKING, Observation(is_compared=False), LIMITS)
    assert (decision.state, "not compared" in decision.reason) == (CANARY, True)


def test_decide_when_parity_is_not_measured_stays():
    assert decide(RolloutState.CHECKING, Observation(), LIMITS).state is RolloutState.CHECKING


def test_decide_when_all_was_good_long_enough_promotes():
    assert decide(CANARY, seen(), LIMITS).state is RolloutState.PROMOTED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"elapsed_s": 10.0}, "50 s"),
        ({"canary": outcomes(20)}, "30 requests"),
        ({"num_compared": 3}, "5 compared prompts"),
        ({"absent_s": EXPIRY_S}, "a replica to go"),
    ],
)
def test_decide_when_something_is_missing_watches_on(changes, words):
    decision = decide(CANARY, seen(**changes), LIMITS)
    assert decision.state is CANARY
    assert words in decision.reason


def test_decide_when_too_few_requests_come_rolls_back_in_the_end():
    decision = decide(CANARY, seen(elapsed_s=901, canary=outcomes(2)), LIMITS)
    assert decision.state is RolloutState.ROLLED_BACK
    assert "48 requests" in decision.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"canary": outcomes(60, failed=5)}, "5 of 60 requests failed"),
        ({"canary": outcomes(1, failed=1)}, "1 of 1 requests failed"),
        ({"num_compared": 10, "num_disagreeing": 10}, "10 of 10 prompts"),
        ({"canary": outcomes(60, first_s=0.2)}, "first token"),
        ({"canary": outcomes(60, between_s=0.05)}, "time between tokens"),
        ({"absent_s": EXPIRY_S + 0.1}, "no replica"),
    ],
)
def test_decide_when_a_limit_is_exceeded_rolls_back_at_once(changes, words):
    decision = decide(CANARY, seen(elapsed_s=1.0, **changes), LIMITS)
    assert decision.state is RolloutState.ROLLED_BACK
    assert words in decision.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"canary": outcomes(200, failed=1)},  # One failure may be chance.
        {"canary": outcomes(60, failed=3), "baseline": outcomes(500, failed=50)},
        {"num_compared": 10, "num_disagreeing": 6},
        {"canary": outcomes(60, first_s=0.06)},
        {"canary": outcomes(60, first_s=0.012), "baseline": outcomes(500, first_s=0.001)},
        {"canary": total([outcomes(58), outcomes(4, first_s=5.0)])},  # The first ones, cold.
        {"baseline": outcomes(0)},  # Nothing to compare with.
    ],
)
def test_decide_when_a_difference_may_be_chance_promotes(changes):
    assert decide(CANARY, seen(**changes), LIMITS).state is RolloutState.PROMOTED


@pytest.mark.parametrize("state", [RolloutState.PROMOTED, RolloutState.ROLLED_BACK])
def test_decide_when_it_has_ended_stays(state):
    assert decide(state, seen(absent_s=60.0), LIMITS).state is state


def test_absence_when_a_replica_is_named_again_begins_anew():
    absence = Absence()
    looks = [(1, 0.0), (0, 1.0), (0, 4.0), (2, 5.0), (0, 9.0), (0, 15.0)]
    assert [absence.look(*look) for look in looks] == [None, 0.0, 3.0, None, 0.0, 6.0]


def test_at_least_when_more_is_counted_comes_closer_to_the_share():
    bounds = [at_least(hits, 10 * hits) for hits in (1, 10, 1000)]
    assert bounds == sorted(bounds)
    assert 0.09 < bounds[-1] < 0.1
    assert at_least(0, 0) == 0
