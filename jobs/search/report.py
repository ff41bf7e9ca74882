"""What a search leaves behind: the table of trials, the front, the winner and why.

Takes a search's inputs and results; gives values, `search.json` and the winner's model directory.
It does not know how the results came about.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config import StrictModel
from cluster.storage import (
    MANIFEST,
    digest_bytes,
    read_manifest,
    staged_directory,
    verify_directory,
    write_json,
)
from jobs.compression.packing import copy_companions
from jobs.config import Recipe
from jobs.evaluation.gate import Verdict
from jobs.search.pareto import Point, front
from jobs.search.plan import Search
from jobs.search.rungs import BASE, Finish, Results, Task, measure, point_of
from jobs.search.space import describe


class TrialRow(StrictModel):
    """One candidate on the last rung it reached; ratios are over the bf16 model."""

    candidate: int
    recipe: Recipe
    summary: str
    rung: int
    perplexity: float | None = None
    perplexity_increase: float | None = None
    perplexity_increase_upper95: float | None = None
    size_bytes: int | None = None
    size_ratio: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    memory_bytes: int | None = None
    seconds: float = 0.0
    on_front: bool = False
    error: str | None = None


class SearchOutcome(StrictModel):
    """The end of a search; `winner_path` is a model directory that passed the gate."""

    name: str
    run_dir: Path
    num_tasks: int
    num_rungs: int
    trials: tuple[TrialRow, ...]
    front: tuple[int, ...]
    winner: int | None
    winner_path: Path | None
    verdict: Verdict | None
    why: str

    def summary(self) -> dict[str, Any]:
        """Return the values to print."""
        return {
            "search": str(self.run_dir / "search.json"),
            "trials": len(self.trials),
            "rungs": self.num_rungs,
            "winner": None if self.winner is None else self.trials[self.winner].summary,
            "model": None if self.winner_path is None else str(self.winner_path),
            "why": self.why,
            **(self.verdict.numbers if self.verdict is not None else {}),
        }


def summarise(search: Search, results: Results, end: Finish) -> SearchOutcome:
    """Return the outcome; the front is taken among the candidates of the last rung."""
    config, recipes = search.config, search.recipes
    rows = [_row(search, each, results) for each in range(len(recipes))]
    last = [row for row in rows if row.rung == len(config.rungs) - 1 and row.error is None]
    on_front = {point.candidate for point in front([_point(row) for row in last])}
    winner = end.winner
    return SearchOutcome(
        name=config.name,
        run_dir=search.run_dir,
        num_tasks=len(results),
        num_rungs=len(config.rungs),
        trials=tuple(row.replace(on_front=row.candidate in on_front) for row in rows),
        front=tuple(sorted(on_front)),
        winner=winner,
        winner_path=search.run_dir / "winner" if winner is not None else None,
        verdict=_nearest(end) if winner is None else end.verdicts[winner],
        why=_why(end, recipes),
    )


def write_outcome(outcome: SearchOutcome) -> None:
    """Write `search.json` beside the journal."""
    write_json(outcome.run_dir / "search.json", outcome.model_dump(mode="json"))


def write_winner(search: Search, outcome: SearchOutcome) -> Path:
    """Write the winner: packed weights, the dense model's tokenizer, and a manifest with the gate.

    A winner written before with the same recipe and verdict, and whole, is kept.
    """
    assert outcome.winner is not None, "no winner to write"
    assert outcome.winner_path is not None, "a winner needs a path"
    row = outcome.trials[outcome.winner]
    manifest = _winner_manifest(search, outcome, row)
    target = outcome.winner_path
    if target.is_dir():
        found = verify_directory(target)
        if all(found.get(key) == value for key, value in manifest.items()):
            return target
    packed = search.packed(outcome.winner)
    verify_directory(packed)
    with staged_directory(target, manifest, replace=True) as staging:
        shutil.copytree(
            packed, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST)
        )
        copy_companions(search.model, staging)
    return target


def _row(search: Search, candidate: int, results: Results) -> TrialRow:
    config, recipe = search.config, search.recipes[candidate]
    rungs = [r for r in range(len(config.rungs)) if Task(rung=r, candidate=candidate) in results]
    rung = max(rungs, default=0)
    found = results[Task(rung=rung, candidate=candidate)]
    values: dict[str, Any] = {
        "candidate": candidate,
        "recipe": recipe,
        "summary": describe(recipe),
        "rung": rung,
        "seconds": sum(results[Task(rung=r, candidate=candidate)].seconds for r in rungs),
        "error": found.error,
    }
    if found.error is None:
        base = results[Task(rung=rung, candidate=BASE)]
        measured = measure(config, search.base_bytes, base, found)
        point = point_of(candidate, measured)
        values |= {
            "perplexity": measured.perplexity,
            "perplexity_increase": point.perplexity_increase,
            "perplexity_increase_upper95": measured.perplexity_increase.upper,
            "size_bytes": measured.size_bytes,
            "size_ratio": point.size_ratio,
            "latency_ms": measured.latency_ms,
            "latency_ratio": point.latency_ratio,
            "memory_bytes": found.memory_bytes,
        }
    return TrialRow(**values)


def _point(row: TrialRow) -> Point:
    assert row.perplexity_increase is not None, "a scored row has a quality"
    assert row.size_ratio is not None, "a scored row has a size"
    return Point(
        candidate=row.candidate,
        perplexity_increase=row.perplexity_increase,
        size_ratio=row.size_ratio,
        latency_ratio=row.latency_ratio,
    )


def _nearest(end: Finish) -> Verdict | None:
    """Return the verdict with the fewest broken limits, the first shown to the gate of equals."""
    return min(end.verdicts.values(), key=lambda verdict: len(verdict.reasons), default=None)


def _why(end: Finish, recipes: Sequence[Recipe]) -> str:
    if end.winner is not None:
        return (
            f"{describe(recipes[end.winner])}: of {len(end.finalists)} finalists, by size, the "
            f"first to pass the gate on data no rung had seen ({len(end.verdicts)} judged there)"
        )
    nearest = min(end.verdicts, key=lambda each: len(end.verdicts[each].reasons), default=None)
    if nearest is None:
        return "no candidate reached the gate"
    reasons = "; ".join(end.verdicts[nearest].reasons)
    return (
        f"none of {len(end.finalists)} finalists passed the gate; the nearest was "
        f"{describe(recipes[nearest])}: {reasons}"
    )


def _winner_manifest(search: Search, outcome: SearchOutcome, row: TrialRow) -> dict[str, Any]:
    assert outcome.verdict is not None, "a winner has a verdict"
    parent = read_manifest(search.model)
    return {
        "kind": "model",
        "recipe": row.recipe.model_dump(mode="json"),
        "gate": outcome.verdict.model_dump(mode="json"),
        "metrics": {**outcome.verdict.numbers, "memory_bytes": row.memory_bytes},
        "lineage": {
            **parent.get("lineage", {}),
            "parent_digest": parent["self_sha256"],
            "data_digest": read_manifest(search.data)["self_sha256"],
            "search": search.config.name,
            "search_config_digest": digest_bytes(search.config.model_dump_json().encode()),
        },
    }
