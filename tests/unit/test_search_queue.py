"""The queue of a search, its tasks answered by a fake."""

import json
from pathlib import Path

import pytest

from cluster.errors import SearchError, StorageError
from jobs.config import DecoderConfig, GateConfig, Recipe, Rung, SearchConfig, Step
from jobs.search.journal import Journal
from jobs.search.plan import Search
from jobs.search.queue import TaskQueue
from jobs.search.rungs import BASE, Result, Task
from jobs.search.trial import TrialSpec

CONFIG = SearchConfig(
    name="s",
    model="m",
    data="d",
    rungs=(Rung(eval_sequences=8, keep_ratio=0.5), Rung(eval_sequences=8, real=True)),
    gate=GateConfig(eval_sequences=8, bootstrap_samples=100, max_size_ratio=0.5),
    max_concurrent_trials=2,
)
SIZES = (1000, 400, 450, 300)


class _FakeWorkers:
    """Answers tasks; candidate c loses c / 1000 nats a token."""

    def __init__(self, folder: Path) -> None:
        recipes = [Recipe(steps=(Step(method="rtn", targets=(str(n),)),)) for n in (1, 2, 3)]
        self.search = Search(
            config=CONFIG,
            run_dir=folder,
            model=folder / "model",
            data=folder / "data",
            decoder=DecoderConfig(),
            recipes=(Recipe(), *recipes),
            base_bytes=SIZES[0],
            fingerprint="f",
        )
        self.lines: list[str] = []
        self.queue = self.open()

    def open(self) -> TaskQueue:
        journal = Journal(self.search.run_dir / "journal.jsonl", "f")
        return TaskQueue(self.search, journal, self.lines.append)

    def candidate(self, spec: TrialSpec) -> int:
        return self.search.recipes.index(spec.recipe)

    def answer(self, spec: TrialSpec) -> dict[str, str]:
        candidate = self.candidate(spec)
        losses = tuple(loss + candidate / 1000 for loss in (3.0, 3.5) * 4)
        result = Result(losses=losses, size_bytes=SIZES[candidate])
        return {"result": json.dumps(result.model_dump(mode="json"))}

    def run(self, limit: int = 100) -> int:
        """Run up to `limit` tasks, oldest first, as many at a time as start; return how many."""
        running: dict[str, TrialSpec] = {}
        num_started = num_done = 0
        while num_done < limit:
            while (spec := self.queue.take(str(num_started))) is not None:
                running[str(num_started)] = spec
                num_started += 1
            if not running:
                break
            key = next(iter(running))
            self.queue.give(key, self.answer(running.pop(key)))
            num_done += 1
        return num_done


@pytest.fixture
def workers(tmp_path: Path) -> _FakeWorkers:
    return _FakeWorkers(tmp_path)


def test_queue_when_run_to_the_end_finds_the_winner(workers: _FakeWorkers) -> None:
    # rung 0: base and 3; rung 1: base and 2; gate: base and 1
    assert workers.run() == 9
    assert workers.queue.is_over
    assert workers.queue.end().winner == 3
    assert len(workers.lines) == 9


def test_queue_when_asked_for_more_than_allowed_gives_none(workers: _FakeWorkers) -> None:
    first, second = workers.queue.take("a"), workers.queue.take("b")
    assert first is not None
    assert second is not None
    assert [workers.candidate(spec) for spec in (first, second)] == [BASE, 1]
    assert workers.queue.take("c") is None
    workers.queue.give("a", workers.answer(first))
    third = workers.queue.take("c")
    assert third is not None
    assert workers.candidate(third) == 2


@pytest.mark.parametrize("num_before", range(9))
def test_queue_when_cut_off_anywhere_goes_on_without_repeating(
    workers: _FakeWorkers, num_before: int
) -> None:
    assert workers.run(limit=num_before) == num_before
    workers.queue = workers.open()
    assert workers.run() == 9 - num_before
    assert workers.queue.end().winner == 3


def test_queue_when_a_worker_died_counts_it_against_its_candidate(workers: _FakeWorkers) -> None:
    workers.queue.take("base")
    workers.queue.take("one")
    workers.queue.give("one", None)
    assert "died" in workers.lines[0]
    wanted = workers.queue.take("next")
    assert wanted is not None
    assert workers.candidate(wanted) == 2
    # Another run tries it again.
    assert Journal(workers.search.run_dir / "journal.jsonl", "f").results == {}


def test_queue_when_a_trial_met_a_full_disk_ends_with_that_error(workers: _FakeWorkers) -> None:
    workers.queue.take("a")
    workers.queue.give("a", {"fatal_class": "StorageError", "fatal": "The disk is full"})
    assert workers.queue.is_over
    with pytest.raises(StorageError, match="disk is full"):
        workers.queue.end()


def test_queue_when_no_candidate_could_be_scored_ends_with_the_reasons(
    workers: _FakeWorkers,
) -> None:
    spec = workers.queue.take("base")
    assert spec is not None
    workers.queue.give("base", workers.answer(spec))
    for key in ("1", "2", "3"):
        workers.queue.take(key)
        workers.queue.give(key, {"result": json.dumps({"error": "no such layer"})})
    assert workers.queue.is_over
    with pytest.raises(SearchError, match="no such layer"):
        workers.queue.end()


def test_queue_when_stopped_early_says_how_much_is_left(workers: _FakeWorkers) -> None:
    workers.run(limit=2)
    with pytest.raises(SearchError, match="Run the same command again"):
        workers.queue.end()


def test_spec_when_the_rung_is_the_gate_reads_the_test_split_with_real_kernels(
    workers: _FakeWorkers,
) -> None:
    rounded, real, gate = (workers.search.spec(Task(rung=r, candidate=1)) for r in range(3))
    assert (rounded.split, rounded.packed) == ("validation", None)
    assert (real.split, real.packed) == ("validation", workers.search.packed(1))
    assert (gate.split, gate.packed) == ("test", workers.search.packed(1))
