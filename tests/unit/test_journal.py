from pathlib import Path

import pytest

from cluster.errors import ConfigError, IntegrityError
from jobs.search.journal import Journal
from jobs.search.tasks import Result, Task

TASK = Task(stage="rung", assignment=(1, 0, 2))
RESULT = Result(losses=(1.25, 0.1), size_bytes=7, seconds=0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "search" / "journal.jsonl"


def test_journal_when_opened_again_has_every_result(path: Path) -> None:
    Journal(path, "f").record(TASK, RESULT)
    assert Journal(path, "f").results == {TASK: RESULT}


def test_journal_when_the_last_line_is_cut_off_drops_it_and_goes_on(path: Path) -> None:
    journal = Journal(path, "f")
    journal.record(TASK, RESULT)
    journal.record(TASK.replace(rung=1), RESULT)
    path.write_bytes(path.read_bytes()[:-20])
    again = Journal(path, "f")
    assert list(again.results) == [TASK]
    again.record(TASK.replace(rung=2), RESULT)
    assert list(Journal(path, "f").results) == [TASK, TASK.replace(rung=2)]


def test_journal_when_a_byte_is_damaged_is_refused(path: Path) -> None:
    Journal(path, "f").record(TASK, RESULT)
    path.write_bytes(path.read_bytes().replace(b"1.25", b"1.35"))
    with pytest.raises(IntegrityError, match="line 2"):
        Journal(path, "f")


def test_journal_when_it_belongs_to_another_search_is_refused(path: Path) -> None:
    Journal(path, "f")
    with pytest.raises(ConfigError, match="another configuration"):
        Journal(path, "g")


def test_journal_when_a_loss_is_infinite_keeps_it(path: Path) -> None:
    broken = Result(losses=(float("inf"), 1.0))
    Journal(path, "f").record(TASK, broken)
    assert Journal(path, "f").results[TASK] == broken
