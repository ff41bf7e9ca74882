"""A search's page: the front with its intervals, what each layer got, and why the winner won.

Takes a search's outcome and results; writes `report.html` beside `search.json`. It computes
nothing.
"""

from pathlib import Path
from typing import Any

from cluster.storage import write_atomic
from jobs import plots
from jobs.kernels.formats import GROUPED, PACKED_BITS
from jobs.pages import in_order, render
from jobs.search.plan import Search
from jobs.search.report import SearchOutcome, TrialRow
from jobs.search.space import Choice
from jobs.search.tasks import Results, Task

_COLORS = {3: "#fde7c7", 4: "#cfe3ff", 8: "#d9f2e3", 16: "#f1f2f4"}


def write_page(search: Search, outcome: SearchOutcome, results: Results) -> Path:
    """Write the page and return its path."""
    trials = [row.model_dump(mode="json") for row in outcome.trials]
    page = render(
        "search.html.j2",
        name=outcome.name,
        model=search.model.name,
        rungs=outcome.num_rungs,
        seconds=sum(result.seconds for result in results.values()),
        why=outcome.why,
        numbers=_numbers(outcome),
        plots=_plots(search, outcome, results),
        layers=_layers(search, outcome),
        trials=in_order(trials),
        winner=outcome.winner,
    )
    path = outcome.run_dir / "report.html"
    write_atomic(path, page)
    return path


def _plots(search: Search, outcome: SearchOutcome, results: Results) -> list[str]:
    gate = search.config.gate
    sized = [
        _point(row, outcome, row.size_ratio)
        for row in outcome.trials
        if row.size_ratio is not None and row.perplexity_increase is not None
    ]
    timed = [
        _point(row, outcome, row.latency_ratio)
        for row in outcome.trials
        if row.latency_ratio is not None and row.perplexity_increase is not None
    ]
    limit = gate.max_perplexity_increase
    drawn = [plots.pareto("Bytes", sized, limits=(gate.max_size_ratio, limit))]
    if timed:
        text = "time of a request, % of bf16"
        drawn.append(plots.pareto("Latency", timed, limits=(None, limit), x=text))
    alone = [
        results[Task(stage="probe", group=number)].divergences
        for number in range(len(search.space.groups))
    ]
    series = {
        str(choice): [found[number] for found in alone]
        for number, choice in enumerate(search.space.choices)
        if not choice.is_nothing
    }
    text = "divergence alone, nats"
    drawn.append(
        plots.grouped_bars(
            "Sensitivity", [group.title for group in search.space.groups], series, y=text
        )
    )
    return drawn


def _point(row: TrialRow, outcome: SearchOutcome, x_ratio: float) -> plots.ParetoPoint:
    assert row.perplexity_increase is not None, "a scored row has a quality"
    return plots.ParetoPoint(
        x_ratio=x_ratio,
        increase=row.perplexity_increase,
        low=row.perplexity_increase_lower95,
        high=row.perplexity_increase_upper95,
        on_front=row.on_front,
        is_winner=row.candidate == outcome.winner,
    )


def _layers(search: Search, outcome: SearchOutcome) -> dict[str, Any]:
    """Return the models of the front as columns, and for each group a row of their choices."""
    models = [outcome.trials[each] for each in outcome.front]
    rows = []
    for number, group in enumerate(search.space.groups):
        chosen = [search.space.choices[row.assignment[number]] for row in models]
        cells = [{"choice": str(each), "color": _COLORS[_bits(each)]} for each in chosen]
        rows.append({"group": group.title, "cells": cells})
    return {"models": models, "rows": rows}


def _bits(choice: Choice) -> int:
    if choice.scheme in GROUPED:
        return PACKED_BITS[choice.scheme]
    return 16 if choice.scheme == "bf16" else 8


def _numbers(outcome: SearchOutcome) -> list[tuple[str, str, str]]:
    if outcome.verdict is None:
        return []
    numbers = outcome.verdict.numbers
    rows = [
        ("perplexity increase, upper 95% bound", "perplexity_increase_upper95"),
        ("size, over bf16", "size_ratio"),
        ("decoding step, over bf16", "latency_ratio"),
    ]
    limits = ("max_perplexity_increase", "max_size_ratio", "max_latency_ratio")
    return [
        (what, _percent(numbers.get(value)), _percent(numbers.get(limit)))
        for (what, value), limit in zip(rows, limits, strict=True)
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"
