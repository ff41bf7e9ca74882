"""The metrics of a run as lines of JSON: one for each step, one for each validation.

Takes and gives plain entries; imports nothing heavy, because drivers and reports read it too.

    {"step": 10, "loss": 6.7, "lr": 0.003, "grad_norm": 0.8, "tokens_per_s": 9100.0, "mfu": 0.31}
    {"step": 100, "validation_loss": 5.2}
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.storage import write_atomic

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the recorded entries of a run in order; a last line that was cut off is left out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def cut_back(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Remove what was recorded after a step, and return what is left."""
    kept = [entry for entry in read_metrics(run_dir) if entry["step"] <= step]
    write_atomic(run_dir / METRICS_FILE, "".join(as_lines(kept)).encode())
    return kept


def as_lines(entries: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Return each entry as one line."""
    return (json.dumps(entry) + "\n" for entry in entries)
