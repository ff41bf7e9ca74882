"""What a search leaves behind: the table of trials, the front, the winner and why.

Takes a search's inputs and results; gives values, `search.json` and the winner's model directory.
It does not know how the results came about.
"""

import math
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
from jobs.config import Recipe
from jobs.evaluation.gate import Verdict
from jobs.search.course import Finish
from jobs.search.forecast import Forecast, emptying, excesses, explain, limits_of
from jobs.search.plan import Search
from jobs.search.rungs import measure
from jobs.search.serving_share import Served, expected_ms
from jobs.search.space import UNCHANGED, Assignment
from jobs.search.tasks import Result, Results, Task


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
    size_bytes: int | None = None
    size_ratio: float | None = None
    latency_ms: float | None = None
    """A request of the workload, in this process."""
    latency_ratio: float | None = None
    predicted_latency_ms: float | None = None
    served_ms: float | None = None
    """The same request through Ray Serve; beside it what was to be expected: see serving_share."""
    predicted_served_ms: float | None = None
    base_served_ms: float | None = None
    """The unchanged model's, asked in turn with it."""
    served_requests: int | None = None
    """How many requests to each the two are medians of."""
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
    """Return the outcome; candidates are numbered in the order in which they were proposed."""
    config = search.config
    rows = [_row(search, end, each, results) for each in range(len(end.candidates))]
    winner = None if end.winner is None else end.candidates.index(end.winner)
    on_front = {end.candidates.index(each) for each in end.front}
    return SearchOutcome(
        name=config.name,
        run_dir=search.run_dir,
        num_tasks=len(results),
        num_rungs=len(config.rungs),
        trials=tuple(row.replace(on_front=row.candidate in on_front) for row in rows),
        front=tuple(sorted(on_front)),
        winner=winner,
        winner_path=search.run_dir / "winner" if winner is not None else None,
        verdict=_nearest(end) if end.winner is None else end.verdicts[end.winner],
        why=_why(search, end, rows),
    )


def write_outcome(outcome: SearchOutcome) -> None:
    """Write `search.json` beside the journal."""
    write_json(outcome.run_dir / "search.json", outcome.model_dump(mode="json"))


def write_winner(search: Search, outcome: SearchOutcome) -> Path:
    """Write the winner: what its trial wrote, and a manifest with the gate.

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
    packed = search.packed(row.assignment)
    verify_directory(packed)
    with staged_directory(target, manifest, replace=True) as staging:
        shutil.copytree(
            packed, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST)
        )
    return target


def _row(search: Search, end: Finish, candidate: int, results: Results) -> TrialRow:
    config, assignment = search.config, end.candidates[candidate]
    tasks = [
        Task(stage="rung", rung=rung, assignment=assignment) for rung in range(len(config.rungs))
    ]
    ran = [task for task in tasks if task in results]
    task = ran[-1] if ran else tasks[0]
    found = results[task]
    request = results.get(Task(stage="request", assignment=assignment), Result())
    row = TrialRow(
        candidate=candidate,
        assignment=assignment,
        recipe=search.space.recipe(assignment, real=config.rungs[task.rung].real),
        summary=search.space.describe(assignment),
        rung=task.rung,
        predicted_latency_ms=end.forecast.latency_ms(assignment),
        latency_ms=request.request_ms,
        latency_ratio=_ratio(request),
        seconds=request.seconds + sum(results[each].seconds for each in ran),
        error=found.error,
        **served_fields(end.forecast, assignment, results),
    )
    if found.error is not None:
        return row
    base = results[task.replace(assignment=UNCHANGED)]
    measured = measure(config, search.space.base_bytes, base, found)
    interval = measured.perplexity_increase
    return row.replace(
        perplexity=_finite(measured.perplexity),
        perplexity_increase=_finite(interval.point),
        perplexity_increase_lower95=_finite(interval.lower),
        perplexity_increase_upper95=_finite(interval.upper),
        size_bytes=measured.size_bytes,
        size_ratio=measured.size_ratio,
        memory_bytes=found.memory_bytes,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _ratio(found: Result) -> float | None:
    if found.request_ms is None or not found.base_request_ms:
        return None
    return found.request_ms / found.base_request_ms


def served_fields(
    forecast: Forecast, assignment: Assignment, results: Results
) -> dict[str, float | int | None]:
    """Return a model's time through Ray Serve, and what was to be expected by all others' times.

    Nothing for a model that was not served.
    """
    found = {
        task.assignment: Served(
            forecast.latency_ms(task.assignment), result.request_ms, result.base_request_ms
        )
        for task, result in results.items()
        if task.stage == "serve" and result.request_ms and result.base_request_ms
    }
    mine = found.pop(assignment, None)
    if mine is None:
        return {}
    return {
        "served_ms": mine.served_ms,
        "predicted_served_ms": expected_ms(
            mine.table_ms, forecast.base_ms, mine.base_served_ms, [*found.values()]
        ),
        "base_served_ms": mine.base_served_ms,
        "served_requests": results[Task(stage="serve", assignment=assignment)].num_requests,
    }


def _nearest(end: Finish) -> Verdict | None:
    """Return the verdict with the fewest broken limits, the first shown to the gate of equals."""
    return min(end.verdicts.values(), key=lambda verdict: len(verdict.reasons), default=None)


def _why(search: Search, end: Finish, rows: Sequence[TrialRow]) -> str:
    describe = search.space.describe
    if end.winner is not None:
        return (
            f"{describe(end.winner)}: by size, the first of the finalists to pass the gate on data "
            f"no rung had seen ({len(end.verdicts)} judged there)"
        )
    nearest = min(end.verdicts, key=lambda each: len(end.verdicts[each].reasons), default=None)
    if nearest is None:
        return "no candidate reached the gate"
    reasons = "; ".join(end.verdicts[nearest].reasons)
    return (
        f"none of {len(end.verdicts)} finalists passed the gate; the nearest was "
        f"{describe(nearest)}: {reasons}{_emptied_by(search, end, rows)}"
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
            "base_served_ms": row.base_served_ms,
        },
        "lineage": {
            **parent.get("lineage", {}),
            "parent_digest": parent["self_sha256"],
            "data_digest": read_manifest(search.data)["self_sha256"],
            "search": search.config.name,
            "search_config_digest": digest_bytes(search.config.model_dump_json().encode()),
        },
    }
