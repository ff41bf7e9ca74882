import pytest
from search_fakes import BASE, answer, play, space, stages

from cluster.errors import ConfigError, SearchError
from jobs.config import GateConfig, SearchLimits
from jobs.search.course import Finish, Wanted, decide
from jobs.search.space import UNCHANGED
from jobs.search.tasks import Result, Task


def test_decide_when_nothing_is_known_wants_the_kernels_timed_first() -> None:
    wanted = decide(space(), {})
    assert isinstance(wanted, Wanted)
    assert wanted.tasks == (Task(stage="times"),)


def test_decide_when_played_goes_from_probes_by_generations_and_rungs_to_ray_serve() -> None:
    end, waves, _ = play(space())
    assert stages(waves) == [
        ("times", 0),
        ("probe", 0),
        ("rung", 0),
        ("rung", 0),
        ("rung", 1),
        ("gate", 0),
        ("serve", 0),
    ]
    assert end.winner is not None
    assert end.verdicts[end.winner].passed
    assert len(end.candidates) == 9
    assert len(set(end.candidates)) == 9


def test_decide_when_played_twice_is_the_same() -> None:
    assert play(space())[2] == play(space())[2]


def test_decide_when_a_rung_is_done_promotes_the_share_that_is_kept() -> None:
    _, waves, _ = play(space())
    last = [task.number for task in waves[4].tasks]
    assert last[0] == BASE
    assert len(last) == 1 + 4


def test_decide_when_part_is_known_wants_the_rest_alone() -> None:
    of = space()
    _, waves, done = play(of)
    rung = waves[2]
    kept = {task: done[task] for wave in waves[:2] for task in wave.tasks}
    kept[rung.tasks[1]] = done[rung.tasks[1]]
    wanted = decide(of, kept)
    assert isinstance(wanted, Wanted)
    assert wanted.tasks == tuple(task for task in rung.tasks if task != rung.tasks[1])


def test_decide_when_a_candidate_failed_goes_on_without_it() -> None:
    def fail(task: Task, result: Result) -> Result:
        failed = task.stage == "rung" and task.rung == 0 and task.number in (2, 3)
        return Result(error="does not fit") if failed else result

    end, waves, _ = play(space(), change=fail)
    assert end.winner not in (None, 2, 3)
    assert not {2, 3} & {task.number for task in waves[4].tasks}


def test_decide_when_every_candidate_failed_raises_with_the_reasons() -> None:
    def fail(task: Task, result: Result) -> Result:
        is_candidate = task.stage == "rung" and task.number != BASE
        return Result(error=f"bad {task.number % 2}") if is_candidate else result

    with pytest.raises(SearchError, match="bad 0; bad 1"):
        play(space(), change=fail)


def test_decide_when_the_base_failed_raises() -> None:
    def fail(task: Task, result: Result) -> Result:
        return Result(error="no") if task == Task(stage="rung") else result

    with pytest.raises(SearchError, match="unchanged model"):
        play(space(), change=fail)


def test_decide_when_kernels_could_not_be_timed_raises() -> None:
    of = space()
    probes = {
        Task(stage="probe", number=n): answer(of, Task(stage="probe", number=n), [UNCHANGED])
        for n in range(len(of.groups))
    }
    with pytest.raises(SearchError, match="kernels could not be timed: none"):
        decide(of, {Task(stage="times"): Result(error="none"), **probes})


def test_decide_when_the_gate_refuses_a_finalist_shows_it_the_next() -> None:
    plain, _, _ = play(space())

    def spoil(task: Task, result: Result) -> Result:
        if task.stage != "gate" or task.number != plain.winner:
            return result
        return result.replace(losses=tuple(loss + 0.2 for loss in result.losses))

    end, _, _ = play(space(), change=spoil)
    assert plain.winner is not None
    assert not end.verdicts[plain.winner].passed
    assert end.winner == plain.finalists[1]


def test_decide_when_none_passes_ends_without_winner_and_serves_nothing() -> None:
    gate = GateConfig(eval_sequences=8, bootstrap_samples=100, max_perplexity_increase=1e-6)
    end, waves, _ = play(space(gate=gate))
    assert isinstance(end, Finish)
    assert end.winner is None
    assert len(end.finalists) == 1
    assert "perplexity" in end.verdicts[end.finalists[0]].reasons[0]
    assert ("serve", 0) not in stages(waves)


def test_decide_when_finalists_are_served_asks_for_the_unchanged_model_too() -> None:
    end, waves, _ = play(space(served_finalists=1))
    assert [task.number for task in waves[-1].tasks] == [BASE, end.winner]


def test_decide_when_no_finalist_is_to_be_served_ends_at_the_gate() -> None:
    _, waves, _ = play(space(served_finalists=0))
    assert stages(waves)[-1] == ("gate", 0)


def test_decide_when_limits_contradict_names_them_and_the_nearest_model() -> None:
    limits = SearchLimits(max_latency_ms=20.5)
    gate = GateConfig(max_size_ratio=0.35)
    with pytest.raises(ConfigError, match="`max_latency_ms` and `max_size_ratio` contradict"):
        play(space(schemes=("bf16", "w8a8", "w4a16"), limits=limits, gate=gate))


def test_decide_when_one_limit_leaves_nothing_names_it_with_the_nearest_value() -> None:
    with pytest.raises(ConfigError, match=r"`max_bytes` leaves nothing.*nearest is `w4a16 all`"):
        play(space(limits=SearchLimits(max_bytes=1000)))


def test_decide_when_later_generations_know_more_proposes_other_candidates() -> None:
    def shift(task: Task, result: Result) -> Result:
        if task.stage != "rung" or task.number == BASE:
            return result
        return result.replace(losses=tuple(3 * loss - 6.0 for loss in result.losses))

    plain, _, _ = play(space())
    shifted, _, _ = play(space(), change=shift)
    assert plain.candidates[:5] == shifted.candidates[:5]
