"""The demo's report: one table and one page with plots, from the files that the stages left.

Takes DemoFacts and the folders of the training run and the search; gives a rich table and
`report.html`, which needs no network. It measures nothing itself.
"""

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.config import StrictModel
from cluster.errors import TrainingError
from cluster.storage import MIB, write_atomic
from jobs import plots
from jobs.pages import in_order, render

MAX_LOSS_RATIO = 0.65


class DemoFacts(StrictModel):
    """What the demo itself saw; everything else is read from the runs' folders."""

    reference: str
    completion: str
    first_token_ms: float
    stream_tokens_per_s: float
    parity_equal: int
    parity_prompts: int
    stage_seconds: dict[str, float]
    train_dir: str
    search_dir: str
    total_s: float = 0.0
    jobs: tuple[dict[str, str], ...] = ()


class Row(StrictModel):
    """One line of the summary."""

    what: str
    before: str
    after: str


def table(facts: DemoFacts) -> Table:
    """Return the summary: what, before, after."""
    drawn = Table("what", "before", "after", title=f"{facts.reference} in {facts.total_s:.0f} s")
    for row in rows(facts):
        drawn.add_row(row.what, row.before, row.after)
    return drawn


def rows(facts: DemoFacts) -> list[Row]:
    """Return the summary's lines."""
    summary = _read(facts.train_dir, "summary.json")
    search = _read(facts.search_dir, "search.json")
    numbers = search["verdict"]["numbers"]
    winner = next(t for t in search["trials"] if t["candidate"] == search["winner"])
    untrained = math.log(_vocab_size(facts))
    loss = summary["validation_loss"]
    base_bytes, size_bytes = numbers["base_size_bytes"], numbers["size_bytes"]
    return [
        Row(
            what="validation loss, nats per token",
            before=f"{untrained:.3f} (untrained)",
            after=f"{loss:.3f} ({loss / untrained - 1:+.1%})",
        ),
        Row(
            what="perplexity, test split",
            before=f"{numbers['base_perplexity']:.2f} (bf16)",
            after=f"{numbers['perplexity']:.2f} "
            f"({numbers['perplexity_increase']:+.2%}, "
            f"95% bound {numbers['perplexity_increase_upper95']:+.2%})",
        ),
        Row(
            what="weights on disk",
            before=f"{base_bytes / MIB:.2f} MiB (bf16)",
            after=f"{size_bytes / MIB:.2f} MiB ({size_bytes / base_bytes:.1%})",
        ),
        Row(
            what="decoding step, batch 1",
            before=f"{numbers['base_latency_ms']:.2f} ms (not compressed)",
            after=f"{numbers['latency_ms']:.2f} ms ({winner['summary']})",
        ),
        Row(
            what="over REST, streaming",
            before="-",
            after=f"first token {facts.first_token_ms:.0f} ms, "
            f"{facts.stream_tokens_per_s:.0f} tokens/s",
        ),
        Row(
            what="greedy answers equal to offline",
            before="-",
            after=f"{facts.parity_equal} of {facts.parity_prompts} prompts",
        ),
    ]


def require_learned(facts: DemoFacts) -> None:
    """Raise TrainingError unless the validation loss is 35% below that of guessing."""
    loss = _read(facts.train_dir, "summary.json")["validation_loss"]
    limit = MAX_LOSS_RATIO * math.log(_vocab_size(facts))
    if not loss <= limit:
        raise TrainingError(
            f"validation loss {loss:.3f} is above {limit:.3f}: the model learned too little. "
            "Raise `train.max_steps` in deploy/recipes/demo.yaml."
        )


def write_report(out: Path, facts: DemoFacts) -> Path:
    """Write `report.html` and return its path."""
    search = _read(facts.search_dir, "search.json")
    page = render(
        "report.html.j2",
        facts=facts,
        rows=rows(facts),
        plots=[_loss_plot(facts), _pareto_plot(search), _latency_plot(search), _size_plot(search)],
        trials=in_order(search["trials"]),
        winner=search["winner"],
        why=search["why"],
    )
    path = out / "report.html"
    write_atomic(path, page)
    return path


def _loss_plot(facts: DemoFacts) -> str:
    lines = (Path(facts.train_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r for r in records if "loss" in r]
    checks = [r for r in records if "validation_loss" in r]
    vocab_size = _vocab_size(facts)
    return plots.curves(
        "Loss",
        [
            plots.Curve("training", [r["step"] for r in steps], [r["loss"] for r in steps]),
            plots.Curve(
                "validation",
                [r["step"] for r in checks],
                [r["validation_loss"] for r in checks],
                color=plots.GOOD,
                dots=True,
            ),
        ],
        x="step",
        y="nats per token",
        level=(f"ln {vocab_size}", math.log(vocab_size)),
    )


def _pareto_plot(search: dict[str, Any]) -> str:
    numbers = search["verdict"]["numbers"]
    points = [
        plots.ParetoPoint(
            x_ratio=trial["size_ratio"],
            increase=trial["perplexity_increase"],
            low=trial["perplexity_increase_lower95"],
            high=trial["perplexity_increase_upper95"],
            on_front=trial["on_front"],
            is_winner=trial["candidate"] == search["winner"],
        )
        for trial in search["trials"]
        if trial["perplexity_increase"] is not None
    ]
    limits = (numbers["max_size_ratio"], numbers["max_perplexity_increase"])
    return plots.pareto("Compression search", points, limits=limits)


def _latency_plot(search: dict[str, Any]) -> str:
    numbers = search["verdict"]["numbers"]
    values = [numbers["base_latency_ms"], numbers["latency_ms"]]
    return plots.bars("Decoding step, batch 1", ["not compressed", "published"], values, unit="ms")


def _size_plot(search: dict[str, Any]) -> str:
    numbers = search["verdict"]["numbers"]
    values = [numbers["base_size_bytes"] / MIB, numbers["size_bytes"] / MIB]
    return plots.bars("Weights on disk", ["bf16", "published"], values, unit="MiB")


def _vocab_size(facts: DemoFacts) -> int:
    return int(_read(facts.train_dir, "model/config.json")["vocab_size"])


def _read(folder: str, name: str) -> dict[str, Any]:
    return dict(json.loads((Path(folder) / name).read_text(encoding="utf-8")))
