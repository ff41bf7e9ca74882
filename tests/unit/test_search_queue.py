"""The queue of a search, its tasks answered by a fake."""

import json
from pathlib import Path

import pytest
from search_fakes import answer, config, space

from cluster.errors import ConfigError, SearchError, StorageError
from jobs.config import SearchLimits
from jobs.search.course import Finish, Wanted
from jobs.search.journal import Journal
from jobs.search.plan import Search
from jobs.search.queue import TaskQueue
from jobs.search.space import UNCHANGED, Space
from jobs.search.tasks import Result, Task
from jobs.search.trial import TrialSpec

# Kernels, 4 groups alone, a base and 8 candidates, a base and 4, 4 requests, a base and a finalist.
NUM_TASKS = 1 + 4 + 9 + 5 + 4 + 2


class _FakeWorkers:
    """Answers tasks by the formula of search_fakes; a task is told by the spec it led to."""

    def __init__(self, folder: Path, of: Space) -> None:
        self.search = Search(
            config=of.config,
            run_dir=folder,
            model=folder / "model",
            data=folder / "data",
            space=of,
            fingerprint="f",
        )
        self.lines: list[str] = []
        self.queue = self.open()

    def open(self) -> TaskQueue:
        journal = Journal(self.search.run_dir / "journal.jsonl", "f")
        return TaskQueue(self.search, journal, self.lines.append)

    def results(self) -> dict[Task, Result]:
        return Journal(self.search.run_dir / "journal.jsonl", "f").results

    def answer(self, key: str) -> dict[str, str]:
        task = self.queue.running[key]
        found = answer(self.search.space, task)
        return {"result": json.dumps(found.model_dump(mode="json"))}

    def run(self, limit: int = 100) -> int:
        """Run up to `limit` tasks, oldest first, as many at a time as start; return how many."""
        running: list[str] = []
        num_started = num_done = 0
        while num_done < limit:
            while self.queue.take(str(num_started)) is not None:
                running.append(str(num_started))
                num_started += 1
            if not running:
                break
            key = running.pop(0)
            self.queue.give(key, self.answer(key))
            num_done += 1
        return num_done


@pytest.fixture
def workers(tmp_path: Path) -> _FakeWorkers:
    return _FakeWorkers(tmp_path, space(served_finalists=0))


def test_queue_when_run_to_the_end_finds_the_winner(workers: _FakeWorkers) -> None:
    assert workers.run() == NUM_TASKS
    assert workers.queue.is_over
    end = workers.queue.end()
    assert isinstance(end, Finish)
    assert end.winner is not None


def test_queue_when_run_tells_every_task_and_the_front_of_each_rung(workers: _FakeWorkers) -> None:
    workers.run()
    fronts = [line for line in workers.lines if line.startswith("front of rung")]
    assert len(workers.lines) == NUM_TASKS + len(fronts)
    assert [line[:15] for line in fronts] == [
        "front of rung 0",
        "front of rung 0",
        "front of rung 1",
    ]
    assert "%" in fronts[0]
    assert workers.lines[0].startswith("a request on uniform models: bf16/None 36.0 ms")


def test_queue_when_asked_for_more_than_allowed_gives_none(workers: _FakeWorkers) -> None:
    first = workers.queue.take("a")
    assert first is not None
    assert first.stage == "times"
    assert workers.queue.take("b") is None  # All else waits for the kernels' times.
    workers.queue.give("a", workers.answer("a"))
    found = [workers.queue.take(key) for key in "bcd"]
    assert [spec and spec.stage for spec in found] == ["probe", "probe", None]


def test_queue_when_time_is_measured_runs_one_task_at_a_time(workers: _FakeWorkers) -> None:
    workers.run(limit=NUM_TASKS - 6)
    first = workers.queue.take("a")
    assert first is not None
    assert first.stage == "request"
    assert workers.queue.take("b") is None


@pytest.mark.parametrize("num_before", range(NUM_TASKS))
def test_queue_when_cut_off_anywhere_goes_on_without_repeating(
    workers: _FakeWorkers, tmp_path: Path, num_before: int
) -> None:
    control = _FakeWorkers(tmp_path / "control", workers.search.space)
    control.run()
    assert workers.run(limit=num_before) == num_before
    workers.queue = workers.open()
    assert workers.run() == NUM_TASKS - num_before
    assert workers.results() == control.results()


def test_queue_when_a_worker_died_counts_it_against_its_candidate(workers: _FakeWorkers) -> None:
    workers.run(limit=5)
    for key in ("base", "one"):
        workers.queue.take(key)
    workers.queue.give("one", None)
    assert "died" in workers.lines[-1]
    # Another run tries it again.
    assert len(workers.results()) == 5


def test_queue_when_a_trial_met_a_full_disk_ends_with_that_error(workers: _FakeWorkers) -> None:
    workers.queue.take("a")
    workers.queue.give("a", {"fatal_class": "StorageError", "fatal": "The disk is full"})
    assert workers.queue.is_over
    with pytest.raises(StorageError, match="disk is full"):
        workers.queue.end()


def test_queue_when_no_candidate_could_be_scored_ends_with_the_reasons(
    workers: _FakeWorkers,
) -> None:
    workers.run(limit=5)
    while (spec := workers.queue.take("next")) is not None:
        is_base = not spec.recipe.steps
        bad = {"result": json.dumps({"error": "no such layer"})}
        workers.queue.give("next", workers.answer("next") if is_base else bad)
    assert workers.queue.is_over
    with pytest.raises(SearchError, match="no such layer"):
        workers.queue.end()


def test_queue_when_limits_contradict_ends_with_them(tmp_path: Path) -> None:
    workers = _FakeWorkers(tmp_path, space(limits=SearchLimits(max_bytes=1)))
    workers.run()
    with pytest.raises(ConfigError, match="max_bytes"):
        workers.queue.end()


def test_queue_when_stopped_early_says_how_much_is_left(workers: _FakeWorkers) -> None:
    workers.run(limit=2)
    with pytest.raises(SearchError, match="Run the same command again"):
        workers.queue.end()


def test_queue_when_only_serving_is_left_leaves_it_to_the_driver(tmp_path: Path) -> None:
    workers = _FakeWorkers(tmp_path, space(served_finalists=2))
    assert workers.run() == NUM_TASKS
    assert workers.queue.is_over
    left = workers.queue.end()
    assert isinstance(left, Wanted)
    assert {task.stage for task in left.tasks} == {"serve"}


def test_spec_when_the_stage_is_the_gate_reads_the_test_split_with_real_kernels(
    workers: _FakeWorkers,
) -> None:
    uniform = workers.search.space.uniform(1)

    def spec(**changes: object) -> TrialSpec:
        task = Task.model_validate({"stage": "rung", "assignment": uniform, **changes})
        return workers.search.spec(task)

    rounded, real, gate, request = (
        spec(),
        spec(rung=1),
        spec(stage="gate"),
        spec(stage="request"),
    )
    folder = workers.search.packed(uniform)
    assert (rounded.split, rounded.packed) == ("validation", None)
    assert (real.split, real.packed) == ("validation", folder)
    assert (gate.split, gate.packed) == ("test", folder)
    assert request.packed == folder
    assert gate.gate == workers.search.config.gate
    assert spec(stage="gate", assignment=UNCHANGED).gate is None
    assert folder != workers.search.packed(workers.search.space.uniform(0))


def test_spec_when_choices_are_measured_alone_starts_at_their_block(
    workers: _FakeWorkers,
) -> None:
    spec = workers.search.spec(Task(stage="probe", group=2))
    assert spec.first_block == 2
    assert len(spec.alone) == len(workers.search.space.choices)
    assert config().probe_sequences == spec.num_sequences
