"""The course of a rollout over a stage without a cluster."""

from itertools import repeat

import pytest

from cluster.errors import ClusterError
from serving.outcomes import Outcomes
from serving.promote import main, roll_out
from serving.rollout import Observation, RolloutLimits, RolloutState

LIMITS = RolloutLimits(canary_ratio=0.2, watch_s=3, min_requests=5, min_compared=0)


class FakeStage:
    """A stage whose observations are scripted; it notes what was done."""

    def __init__(self, *seen: Observation | BaseException) -> None:
        self.seen = list(seen)
        self.done: list[object] = []
        self.finish_errors = iter(())

    def start(self) -> None:
        self.done.append("start")

    def observe(self, state: RolloutState) -> Observation:
        item = self.seen.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    def give_share(self, ratio: float) -> None:
        self.done.append(ratio)

    def finish(self, state: RolloutState) -> None:
        self.done.append(state)
        if (error := next(self.finish_errors, None)) is not None:
            raise error


PROMOTED = (Observation(parity=1.0), Observation(elapsed_s=3, canary=Outcomes(9)))


def good(elapsed_s: float, num_requests: int) -> Observation:
    return Observation(elapsed_s=elapsed_s, canary=Outcomes(num_requests))


def run(stage: FakeStage) -> tuple[RolloutState, list[str]]:
    said = []
    decision = roll_out(
        stage, LIMITS, sleep=lambda _: None, report=lambda d: said.append(d.state.value)
    )
    return decision.state, said


def test_roll_out_when_all_is_good_gives_a_share_and_then_everything():
    stage = FakeStage(Observation(parity=1.0), good(1, 1), good(2, 4), good(3, 9))
    state, said = run(stage)
    assert state is RolloutState.PROMOTED
    assert stage.done == ["start", 0.2, RolloutState.PROMOTED]
    assert (said[0], said[-1]) == ("checking", "promoted")


def test_roll_out_when_parity_fails_never_gives_a_share():
    stage = FakeStage(Observation(parity=0.2))
    assert run(stage)[0] is RolloutState.ROLLED_BACK
    assert stage.done == ["start", RolloutState.ROLLED_BACK]


def test_roll_out_when_requests_fail_rolls_back_by_itself():
    stage = FakeStage(Observation(parity=1.0), Observation(canary=Outcomes(5, 5)))
    assert run(stage)[0] is RolloutState.ROLLED_BACK
    assert stage.done == ["start", 0.2, RolloutState.ROLLED_BACK]


@pytest.mark.parametrize("error", [ClusterError("gone"), KeyboardInterrupt()])
def test_roll_out_when_interrupted_gives_the_old_version_its_requests_back(error):
    stage = FakeStage(Observation(parity=1.0), error)
    with pytest.raises(type(error)):
        run(stage)
    assert stage.done[-1] is RolloutState.ROLLED_BACK


@pytest.mark.parametrize("error", [ClusterError("UNHEALTHY"), TimeoutError()])
def test_roll_out_when_the_end_fails_once_carries_out_the_same_end_again(error):
    stage = FakeStage(*PROMOTED)
    stage.finish_errors = iter([error])
    assert run(stage)[0] is RolloutState.PROMOTED
    assert stage.done == ["start", 0.2, RolloutState.PROMOTED, RolloutState.PROMOTED]


def test_roll_out_when_the_end_fails_for_good_says_so_and_takes_nothing_back():
    stage = FakeStage(*PROMOTED)
    stage.finish_errors = repeat(ClusterError("no disk."))
    with pytest.raises(ClusterError, match=r"promoted .* new version failed 5 times: no disk\. N"):
        run(stage)
    assert set(stage.done[2:]) == {RolloutState.PROMOTED}


def test_roll_out_when_stopped_at_the_end_takes_nothing_back():
    stage = FakeStage(*PROMOTED)
    stage.finish_errors = iter([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        run(stage)
    assert stage.done == ["start", 0.2, RolloutState.PROMOTED]


def test_roll_out_when_interrupted_and_the_end_fails_says_both():
    stage = FakeStage(Observation(parity=1.0), ClusterError("the head is gone"))
    stage.finish_errors = repeat(ClusterError("no answer"))
    with pytest.raises(ClusterError, match=r"the head is gone.*no answer"):
        run(stage)
    assert set(stage.done[2:]) == {RolloutState.ROLLED_BACK}


def test_main_when_asked_for_the_plan_prints_it_and_starts_nothing(capsys):
    code = main(["--set", "model=tiny@2", "--set", "limits.canary_ratio=0.1", "--dry-run"])
    assert code == 0
    assert "10% of the requests" in capsys.readouterr().out
