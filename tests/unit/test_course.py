import pytest
from search_fakes import answer, play, space, stages

from cluster.errors import ConfigError, SearchError
from jobs.config import CalibrationConfig, GateConfig, SearchLimits
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
        ("request", 0),
        ("gate", 0),
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
    last = [task.assignment for task in waves[4].tasks]
    assert last[0] == UNCHANGED
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
    plain, _, _ = play(space())
    bad = plain.candidates[2:4]

    def fail(task: Task, result: Result) -> Result:
        failed = task.stage == "rung" and task.rung == 0 and task.assignment in bad
        return Result(error="does not fit") if failed else result

    end, waves, _ = play(space(), change=fail)
    assert end.winner not in (None, *bad)
    assert not set(bad) & {task.assignment for task in waves[4].tasks}


def test_decide_when_every_candidate_failed_raises_with_the_reasons() -> None:
    def fail(task: Task, result: Result) -> Result:
        is_candidate = task.stage == "rung" and task.assignment
        return Result(error=f"bad {task.assignment[0] % 2}") if is_candidate else result

    with pytest.raises(SearchError, match="bad 0; bad 1"):
        play(space(), change=fail)


def test_decide_when_the_base_failed_raises() -> None:
    def fail(task: Task, result: Result) -> Result:
        return Result(error="no") if task == Task(stage="rung") else result

    with pytest.raises(SearchError, match="unchanged model"):
        play(space(), change=fail)


def test_decide_when_kernels_could_not_be_timed_raises() -> None:
    with pytest.raises(SearchError, match="kernels could not be timed: none"):
        decide(space(), {Task(stage="times"): Result(error="none")})


def test_decide_when_a_choice_was_no_number_alone_avoids_it() -> None:
    of = space()

    def spoil(task: Task, result: Result) -> Result:
        if task.stage != "probe":
            return result
        return result.replace(divergences=(*result.divergences[:-1], float("nan")))

    end, _, _ = play(of, change=spoil)
    assert end.winner is not None
    mixed = [each for each in end.candidates[3:] if len(of.choices) - 1 in each]
    assert len(mixed) < len(end.candidates) / 2


def test_decide_when_losses_are_no_numbers_promotes_others() -> None:
    plain, _, _ = play(space())
    bad = plain.candidates[1]

    def spoil(task: Task, result: Result) -> Result:
        is_bad = task.stage == "rung" and task.assignment == bad
        return result.replace(losses=(float("nan"),) * 8) if is_bad else result

    end, waves, _ = play(space(), change=spoil)
    assert end.winner not in (None, bad)
    assert bad not in {task.assignment for task in waves[4].tasks}


def test_decide_when_a_worker_died_before_a_restart_takes_no_result_for_anothers() -> None:
    of = space()
    plain, _, done = play(of)
    dead = Task(stage="rung", assignment=plain.candidates[3])

    def die(task: Task, result: Result) -> Result:
        return Result(error="its worker died") if task == dead else result

    _, _, with_death = play(of, change=die)
    kept = {task: found for task, found in with_death.items() if task != dead}
    end, _, after = play(of, kept)
    assert after == done | after
    assert all(after[task] == answer(of, task) for task in after)
    assert end.winner == plain.winner


def test_decide_when_the_gate_refuses_a_finalist_shows_it_the_next() -> None:
    plain, _, _ = play(space())

    def spoil(task: Task, result: Result) -> Result:
        if task.stage != "gate" or task.assignment != plain.winner:
            return result
        return result.replace(losses=tuple(loss + 0.2 for loss in result.losses))

    end, _, _ = play(space(), change=spoil)
    assert plain.winner is not None
    assert not end.verdicts[plain.winner].passed
    assert end.winner not in (None, plain.winner)
    assert list(end.verdicts) == [plain.winner, end.winner]
    assert end.verdicts[end.winner].numbers["num_judged"] == 4


def test_decide_when_none_passes_ends_without_winner_and_serves_nothing() -> None:
    gate = GateConfig(eval_sequences=8, bootstrap_samples=100, max_perplexity_increase=1e-6)
    end, waves, _ = play(space(gate=gate))
    assert isinstance(end, Finish)
    assert end.winner is None
    (verdict,) = end.verdicts.values()
    assert "perplexity" in verdict.reasons[0]
    assert ("serve", 0) not in stages(waves)


def test_decide_when_one_finalist_is_served_asks_for_the_winner() -> None:
    end, waves, _ = play(space(served_finalists=1))
    assert [task.assignment for task in waves[-1].tasks] == [end.winner]


def test_decide_when_no_finalist_is_to_be_served_ends_at_the_gate() -> None:
    _, waves, _ = play(space(served_finalists=0))
    assert stages(waves)[-1] == ("gate", 0)


def test_decide_when_limits_contradict_names_them_and_the_nearest_model() -> None:
    limits = SearchLimits(max_latency_ms=20.5)
    gate = GateConfig(max_size_ratio=0.35)
    with pytest.raises(ConfigError, match="`max_latency_ms` and `max_size_ratio` contradict"):
        play(space(schemes=("bf16", "w8a8", "w4a16"), limits=limits, gate=gate))


def test_decide_when_only_a_mixture_keeps_to_two_limits_finds_it() -> None:
    formats = ("bf16", "w8a8", "w4a16")
    plain = space(schemes=formats)
    sizes = [plain.size_bytes(plain.uniform(c)) for c in (1, 2)]
    limits = SearchLimits(max_bytes=int(sum(sizes) / 2) + 1000, max_latency_ms=21.7)
    of = space(schemes=formats, limits=limits, gate=GateConfig(max_size_ratio=0.9))
    assert any(wave.tasks[0].stage == "rung" for wave in play(of)[1])


def test_decide_when_a_request_takes_longer_than_allowed_is_refused_at_the_gate() -> None:
    def slow(task: Task, result: Result) -> Result:
        return result.replace(request_ms=500.0) if task.stage == "request" else result

    end, _, _ = play(space(limits=SearchLimits(max_latency_ms=30.0)), change=slow)
    assert end.winner is None
    assert all("milliseconds a request" in v.reasons[-1] for v in end.verdicts.values())


def test_decide_when_rounding_stands_in_for_a_better_method_rules_nothing_out() -> None:
    def worse(task: Task, result: Result) -> Result:
        if task.stage != "rung" or not task.assignment or task.rung:
            return result
        return result.replace(losses=tuple(loss + 0.1 for loss in result.losses))

    text = CalibrationConfig(data="d")
    end, _, _ = play(space(quantizer="gptq", calibration=text), change=worse)
    assert end.winner is not None


def test_decide_when_one_limit_leaves_nothing_names_it_with_the_nearest_value() -> None:
    with pytest.raises(ConfigError, match=r"`max_bytes` leaves nothing.*nearest is `w4a16 all`"):
        play(space(limits=SearchLimits(max_bytes=1000)))


def test_decide_when_later_generations_know_more_proposes_other_candidates() -> None:
    def shift(task: Task, result: Result) -> Result:
        if task.stage != "rung" or not task.assignment:
            return result
        return result.replace(losses=tuple(3 * loss - 6.0 for loss in result.losses))

    plain, _, _ = play(space())
    shifted, _, _ = play(space(), change=shift)
    assert plain.candidates[:5] == shifted.candidates[:5]
