import pytest
from pydantic import ValidationError

from jobs.config import ReplicaScaling
from serving.autoscaling import Load, Policy, Since, decide

SCALING = ReplicaScaling(
    min_replicas=0,
    max_replicas=4,
    target_tokens=1000,
    max_queue_age_s=1.0,
    upscale_delay_s=2.0,
    downscale_delay_s=30.0,
    to_zero_delay_s=300.0,
)


def follow(
    loads: list[tuple[float, Load]], start: int, scaling: ReplicaScaling = SCALING
) -> list[int]:
    """Return the number of replicas after each load, given at its time."""
    number, since, numbers = start, Since(), []
    for now_s, load in loads:
        number, since = decide(load, number, scaling, since, now_s)
        numbers.append(number)
    return numbers


def test_decide_when_asleep_and_asked_wakes_at_once():
    assert follow([(0, Load(num_asleep=1))], 0) == [1]


def test_decide_when_asleep_and_nobody_asks_stays_asleep():
    assert follow([(0, Load()), (1000, Load())], 0) == [0, 0]


def test_decide_when_tokens_exceed_the_target_for_long_enough_adds_what_is_needed():
    busy = Load(tokens_in_flight=2500)
    assert follow([(0, busy), (1, busy), (2, busy)], 1) == [1, 1, 3]


def test_decide_when_load_is_a_short_burst_changes_nothing():
    busy, idle = Load(tokens_in_flight=2500), Load(tokens_in_flight=800)
    assert follow([(0, busy), (1, idle), (2, busy), (3, idle)], 1) == [1, 1, 1, 1]


def test_decide_when_a_sequence_waits_too_long_adds_one():
    waiting = Load(tokens_in_flight=100, queue_age_s=1.5)
    assert follow([(0, waiting), (2, waiting)], 2) == [2, 3]


def test_decide_when_a_replica_still_starts_adds_no_other_for_what_waits():
    waiting = Load(tokens_in_flight=100, queue_age_s=9.0, num_starting=1)
    assert follow([(0, waiting), (2, waiting), (60, waiting)], 2) == [2, 2, 2]


def test_decide_when_load_is_above_the_bound_stops_there():
    assert follow([(0, Load(1e9)), (9, Load(1e9))], 1) == [1, 4]


def test_decide_when_load_falls_for_long_enough_removes_replicas():
    calm = Load(tokens_in_flight=600)
    assert follow([(0, calm), (29, calm), (30, calm)], 3) == [3, 3, 1]


def test_decide_when_load_is_just_below_a_boundary_keeps_what_there_is():
    near = Load(tokens_in_flight=900)
    assert follow([(0, near), (100, near)], 2) == [2, 2]


def test_decide_when_idle_goes_to_zero_by_way_of_one_and_later():
    idle = Load()
    assert follow([(0, idle), (30, idle), (60, idle), (329, idle), (360, idle)], 3) == [
        3,
        1,
        1,
        1,
        0,
    ]


def test_decide_when_zero_is_not_allowed_keeps_one():
    least_one = SCALING.replace(min_replicas=1)
    assert follow([(0, Load()), (1000, Load())], 1, least_one) == [1, 1]


def test_scaling_when_bounds_cross_is_refused():
    with pytest.raises(ValidationError, match="`min_replicas` = 3 exceeds `max_replicas` = 2"):
        ReplicaScaling(min_replicas=3, max_replicas=2)


class Value:
    def __init__(self, value: float) -> None:
        self.value = value


class Context:
    """What the policy reads of Ray Serve's context."""

    def __init__(self, number: int, now_s: float, state=None, requests=0.0, **metrics) -> None:
        self.target_num_replicas = self.current_num_replicas = number
        self.current_time = now_s
        self.policy_state = state
        self.total_num_requests = requests
        self.raw_metrics = {
            name: {str(at): [Value(0.0), Value(value)] for at, value in enumerate(values)}
            for name, values in metrics.items()
        }


def test_policy_when_replicas_report_adds_their_last_tokens_and_remembers_since_when():
    policy = Policy(max_replicas=4, target_tokens=1000, upscale_delay_s=2)
    number, state = policy(Context(2, 10.0, tokens_in_flight=[1500, 1200], queue_age_s=[0, 0]))
    assert (number, state) == (2, {"above_s": 10.0, "below_s": None})
    number, _ = policy(Context(2, 12.0, state, tokens_in_flight=[1500, 1200]))
    assert number == 3


def test_policy_when_a_replica_still_starts_waits_for_it_before_the_next():
    policy = Policy(max_replicas=9, target_tokens=1000, max_queue_age_s=1, upscale_delay_s=2)
    number, state = policy(Context(1, 10.0, queue_age_s=[5]))
    number, state = policy(Context(number, 12.0, state, queue_age_s=[7]))
    assert number == 2
    for now_s in (14.0, 16.0, 18.0):
        context = Context(number, now_s, state, queue_age_s=[9])
        context.current_num_replicas = 1
        number, state = policy(context)
    assert number == 2


def test_policy_when_a_request_waits_at_zero_wakes_the_model():
    assert Policy(min_replicas=0)(Context(0, 0.0, requests=1.0))[0] == 1
