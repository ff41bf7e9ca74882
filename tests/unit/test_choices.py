"""Measured choices of operators: remembered for the same problem and threads, and only those."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.kernels.choices import Choice, recall, remember
from jobs.kernels.formats import Layout
from jobs.kernels.operator import Problem

PROBLEM = Problem(Layout("w4a8", 64), 96, 128, torch.float32, torch.device("cpu"))
CHOICE = Choice("cpp", {"cpp": 1.5, "reference": 90.0}, {"other": "it is absent"})


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RAYSMITH_CACHE", str(tmp_path))
    return tmp_path


def test_choice_when_remembered_is_recalled() -> None:
    assert recall(PROBLEM, 2) is None
    remember(PROBLEM, 2, CHOICE)
    assert recall(PROBLEM, 2) == CHOICE


def test_choice_when_another_is_remembered_stays() -> None:
    other = replace(PROBLEM, out_features=64)
    remember(PROBLEM, 2, CHOICE)
    remember(other, 2, replace(CHOICE, operator="reference"))
    assert recall(PROBLEM, 2) == CHOICE
    assert recall(other, 2) == replace(CHOICE, operator="reference")


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": Layout("w4a8", 32)},
        {"layout": Layout("w4a16", 64)},
        {"out_features": 97},
        {"in_features": 64},
        {"dtype": torch.bfloat16},
    ],
)
def test_choice_when_the_problem_differs_is_not_taken(changes: dict[str, object]) -> None:
    remember(PROBLEM, 2, CHOICE)
    assert recall(replace(PROBLEM, **changes), 2) is None  # type: ignore[arg-type]  # parametrized


def test_choice_when_threads_differ_is_not_taken() -> None:
    remember(PROBLEM, 2, CHOICE)
    assert recall(PROBLEM, 1) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}'])
def test_choice_when_the_file_is_damaged_is_made_anew(content: str, cache: Path) -> None:
    remember(PROBLEM, 2, CHOICE)
    (file,) = cache.glob("operators/*.json")
    file.write_text(content)
    assert recall(PROBLEM, 2) is None
    remember(PROBLEM, 2, CHOICE)
    assert recall(PROBLEM, 2) == CHOICE


def test_choice_when_written_by_another_version_is_not_taken(cache: Path) -> None:
    remember(PROBLEM, 2, CHOICE)
    (file,) = cache.glob("operators/*.json")
    file.write_text(file.read_text().replace("microseconds", "milliseconds"))
    assert recall(PROBLEM, 2) is None


def test_choice_when_the_cache_cannot_be_written_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYSMITH_CACHE", str(tmp_path / "file"))
    remember(PROBLEM, 2, CHOICE)
    assert "measured again at the next start" in caplog.text
