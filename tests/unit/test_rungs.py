import pytest

from cluster.errors import SearchError
from jobs.config import GateConfig, Rung, SearchConfig
from jobs.search.rungs import BASE, Finish, Result, Task, decide, promote

BASE_BYTES = 1000
CONFIG = SearchConfig(
    name="s",
    model="m",
    data="d",
    rungs=(Rung(eval_sequences=8, keep_ratio=0.5), Rung(eval_sequences=8, real=True)),
    gate=GateConfig(eval_sequences=8, bootstrap_samples=100, max_size_ratio=0.5),
)
BASE_RESULT = Result(losses=(3.0, 3.5) * 4, size_bytes=BASE_BYTES)

Scores = dict[int, tuple[float, int]]  # candidate -> rise of the loss, bytes


def _result(rise: float, size_bytes: int) -> Result:
    losses = tuple(loss + rise for loss in BASE_RESULT.losses)
    return Result(losses=losses, size_bytes=size_bytes, latency_ms=1.0, base_latency_ms=2.0)


def _play(
    scores: Scores, results: dict[Task, Result] | None = None
) -> tuple[Finish, list[list[Task]]]:
    """Answer every wanted task from `scores` until the end; return it and the waves of tasks."""
    done = dict(results or {})
    waves = []
    while True:
        wanted = decide(CONFIG, len(scores) + 1, BASE_BYTES, done)
        if isinstance(wanted, Finish):
            return wanted, waves
        waves.append(wanted)
        for task in wanted:
            is_base = task.candidate == BASE
            done[task] = BASE_RESULT if is_base else _result(*scores[task.candidate])


def test_decide_when_nothing_is_known_wants_the_base_and_every_candidate() -> None:
    wanted = decide(CONFIG, 4, BASE_BYTES, {})
    assert wanted == [Task(rung=0, candidate=each) for each in range(4)]


def test_decide_when_a_rung_is_done_promotes_the_share_that_is_kept() -> None:
    end, waves = _play({1: (0.001, 450), 2: (0.5, 300), 3: (0.0, 900), 4: (0.002, 400)})
    assert {task.candidate for task in waves[1]} == {BASE, 1, 4}
    assert end.winner == 4


def test_decide_when_several_pass_takes_the_smallest_and_shows_only_it_to_the_gate() -> None:
    end, waves = _play({1: (0.0, 450), 2: (0.001, 400)})
    assert [task.candidate for task in waves[-1]] == [BASE, end.winner]
    assert set(end.verdicts) == {end.winner}


def test_decide_when_the_gate_refuses_the_first_shows_it_the_next() -> None:
    scores: Scores = {1: (0.001, 400), 2: (0.0, 450), 3: (0.9, 300), 4: (0.9, 300)}
    refused = {
        Task(rung=2, candidate=BASE): BASE_RESULT,
        Task(rung=2, candidate=1): _result(0.2, 400),
    }
    end, _ = _play(scores, refused)
    assert end.winner == 2
    assert not end.verdicts[1].passed


def test_decide_when_none_is_within_the_limits_judges_the_nearest_and_ends_without_winner() -> None:
    end, _ = _play({1: (0.05, 400), 2: (0.5, 400), 3: (0.9, 400), 4: (0.06, 400)})
    assert end.winner is None
    assert end.finalists == (1,)
    assert "perplexity" in end.verdicts[1].reasons[0]


def test_decide_when_asked_again_with_part_of_the_results_wants_the_rest() -> None:
    results = {Task(rung=0, candidate=BASE): BASE_RESULT, Task(rung=0, candidate=2): _result(0, 1)}
    wanted = decide(CONFIG, 4, BASE_BYTES, results)
    assert wanted == [Task(rung=0, candidate=1), Task(rung=0, candidate=3)]


def test_decide_when_a_candidate_failed_goes_on_without_it() -> None:
    failed = {Task(rung=0, candidate=1): Result(error="does not fit")}
    end, waves = _play({1: (0.0, 300), 2: (0.001, 400)}, failed)
    assert end.winner == 2
    assert all(task.candidate != 1 for wave in waves for task in wave)


def test_decide_when_a_loss_is_infinite_drops_the_candidate() -> None:
    broken = {Task(rung=0, candidate=1): Result(losses=(float("inf"),) * 8, size_bytes=300)}
    end, _ = _play({1: (0.0, 300), 2: (0.001, 400)}, broken)
    assert end.winner == 2


def test_decide_when_every_candidate_failed_raises_with_the_reasons() -> None:
    results = {Task(rung=0, candidate=BASE): BASE_RESULT}
    results |= {Task(rung=0, candidate=each): Result(error=f"bad {each}") for each in (1, 2)}
    with pytest.raises(SearchError, match="bad 1; bad 2"):
        decide(CONFIG, 3, BASE_BYTES, results)


def test_decide_when_the_base_failed_raises() -> None:
    results = {
        Task(rung=0, candidate=0): Result(error="no"),
        Task(rung=0, candidate=1): BASE_RESULT,
    }
    with pytest.raises(SearchError, match="unchanged model"):
        decide(CONFIG, 2, BASE_BYTES, results)


def test_decide_when_a_finalist_fails_at_the_gate_takes_the_next() -> None:
    results = {Task(rung=2, candidate=1): Result(error="worker died")}
    end, _ = _play({1: (0.0, 300), 2: (0.001, 400), 3: (0.9, 400), 4: (0.9, 400)}, results)
    assert end.winner == 2
    assert "worker died" in end.verdicts[1].reasons[0]


def test_promote_when_the_share_is_tiny_keeps_one() -> None:
    end, waves = _play({1: (0.0, 400)})
    assert end.winner == 1
    assert len(waves) == 3


def test_promote_when_some_exceed_the_limits_prefers_those_within() -> None:
    from jobs.search.rungs import measure

    scores = {1: (0.0, 900), 2: (0.001, 450), 3: (0.8, 100)}
    measured = {
        each: measure(CONFIG, BASE_BYTES, BASE_RESULT, _result(*score))
        for each, score in scores.items()
    }
    assert promote(CONFIG, measured, keep_ratio=1.0) == [2, 1, 3]
