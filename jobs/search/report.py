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
from jobs.search.course import Finish
from jobs.search.forecast import emptying, excesses, explain, limits_of
from jobs.search.pareto import Point, front
from jobs.search.plan import Search
from jobs.search.rungs import measure
from jobs.search.space import Assignment
from jobs.search.tasks import BASE, Result, Results, Task


class TrialRow(StrictModel):
    """One candidate on the last rung it reached; ratios are over the bf16 model."""

    candidate: int
    assignment: Assignment
    recipe: Recipe
    summary: str
    rung: int
    perplexity: float | None = None
    perplexity_increase: float | None = None
    perplexity_increase_lower95: float | None = None
    perplexity_increase_upper95: float | None = None
    predicted_increase: float | None = None
    size_bytes: int | None = None
    size_ratio: float | None = None
    latency_ms: float | None = None
    """A request of the workload, in this process."""
    latency_ratio: float | None = None
    predicted_latency_ms: float | None = None
    served_ms: float | None = None
    """The same request through Ray Serve; beside it what the kernels' table says of it."""
    predicted_served_ms: float | None = None
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
            "trials": len(self.trials) - 1,  # Without the unchanged model.
            "rungs": self.num_rungs,
            "winner": None if self.winner is None else self.trials[self.winner].summary,
            "model": None if self.winner_path is None else str(self.winner_path),
            "why": self.why,
            "report": str(self.run_dir / "report.html"),
            **(self.verdict.numbers if self.verdict is not None else {}),
        }


def summarise(search: Search, results: Results, end: Finish) -> SearchOutcome:
    """Return the outcome; the front is taken among the candidates of the last rung."""
    config = search.config
    rows = [_row(search, end, each, results) for each in range(len(end.candidates))]
    last = [row for row in rows if row.rung == len(config.rungs) - 1 and row.error is None]
    on_front = {point.candidate for point in front([_point(row) for row in last if row.assignment])}
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
        why=_why(search, end, rows),
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


def _row(search: Search, end: Finish, candidate: int, results: Results) -> TrialRow:
    config, assignment = search.config, end.candidates[candidate]
    tasks = [Task(stage="rung", rung=rung, number=candidate) for rung in range(len(config.rungs))]
    ran = [task for task in tasks if task in results]
    task = ran[-1] if ran else tasks[0]
    found = results[task]
    row = TrialRow(
        candidate=candidate,
        assignment=assignment,
        recipe=search.space.recipe(assignment, real=config.rungs[task.rung].real),
        summary=search.space.describe(assignment),
        rung=task.rung,
        predicted_latency_ms=end.forecast.latency_ms(assignment),
        predicted_increase=end.forecast.point(candidate, assignment).perplexity_increase,
        seconds=sum(results[each].seconds for each in ran),
        error=found.error,
        **_served(end, candidate, results),
    )
    if found.error is not None:
        return row
    base = results[task.replace(number=BASE)]
    measured = measure(config, search.space.base_bytes, base, found)
    return row.replace(
        perplexity=measured.perplexity,
        perplexity_increase=measured.perplexity_increase.point,
        perplexity_increase_lower95=measured.perplexity_increase.lower,
        perplexity_increase_upper95=measured.perplexity_increase.upper,
        size_bytes=measured.size_bytes,
        size_ratio=measured.size_ratio,
        latency_ms=found.request_ms,
        latency_ratio=_ratio(found),
        memory_bytes=found.memory_bytes,
    )


def _ratio(found: Result) -> float | None:
    if found.request_ms is None or not found.base_request_ms:
        return None
    return found.request_ms / found.base_request_ms


def _served(end: Finish, candidate: int, results: Results) -> dict[str, float | None]:
    """Return a candidate's time through Ray Serve, and what was to be expected.

    What Serve adds to the kernels is taken from the unchanged model, served first.
    """
    base = results.get(Task(stage="serve", number=BASE))
    found = results.get(Task(stage="serve", number=candidate))
    if base is None or found is None or base.request_ms is None:
        return {}
    added_ms = base.request_ms - end.forecast.base_ms
    expected_ms = end.forecast.latency_ms(end.candidates[candidate]) + added_ms
    return {"served_ms": found.request_ms, "predicted_served_ms": expected_ms}


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


def _why(search: Search, end: Finish, rows: Sequence[TrialRow]) -> str:
    if end.winner is not None:
        return (
            f"{rows[end.winner].summary}: of {len(end.finalists)} finalists, by size, the "
            f"first to pass the gate on data no rung had seen ({len(end.verdicts)} judged there)"
        )
    nearest = min(end.verdicts, key=lambda each: len(end.verdicts[each].reasons), default=None)
    if nearest is None:
        return "no candidate reached the gate"
    reasons = "; ".join(end.verdicts[nearest].reasons)
    return (
        f"none of {len(end.finalists)} finalists passed the gate; the nearest was "
        f"{rows[nearest].summary}: {reasons}{_emptied_by(search, end, rows)}"
    )


def _emptied_by(search: Search, end: Finish, rows: Sequence[TrialRow]) -> str:
    """Return which limits leave nothing of what was tried, if the measured points say so."""
    limits = limits_of(search.space)
    every = []
    for row in rows:
        if row.error is None and row.assignment and row.perplexity_increase is not None:
            values = end.forecast.values(row.assignment)
            values["max_perplexity_increase"] = row.perplexity_increase
            every.append(excesses(values, limits))
    if not every or not all(every):
        return ""
    return f" (of all that was tried: {explain(emptying(every))})"


def _winner_manifest(search: Search, outcome: SearchOutcome, row: TrialRow) -> dict[str, Any]:
    assert outcome.verdict is not None, "a winner has a verdict"
    parent = read_manifest(search.model)
    return {
        "kind": "model",
        "recipe": row.recipe.model_dump(mode="json"),
        "gate": outcome.verdict.model_dump(mode="json"),
        "metrics": {
            **outcome.verdict.numbers,
            "memory_bytes": row.memory_bytes,
            "request_ms": row.latency_ms,
            "served_ms": row.served_ms,
        },
        "lineage": {
            **parent.get("lineage", {}),
            "parent_digest": parent["self_sha256"],
            "data_digest": read_manifest(search.data)["self_sha256"],
            "search": search.config.name,
            "search_config_digest": digest_bytes(search.config.model_dump_json().encode()),
        },
    }
