"""`python -m benchmarks.search --json OUT`: every figure that is claimed of the search.

Sections: `search` sets it beside random search, TPE, the additive knapsack and uniform recipes at
equal seconds of trials; `served` times the published front through Ray Serve beside what was
predicted; `resume` kills the driver at random moments.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import torch

from benchmarks._remembered import COMPRESSION, Remembered
from benchmarks._report import document_of, run_sections, say_on_stderr
from benchmarks.compression.subject import Subject, subject, subjects
from benchmarks.search import contenders
from benchmarks.search.configs import search_config
from benchmarks.search.kills import measure_kills
from benchmarks.search.plots import draw_fronts
from benchmarks.search.runs import cluster, run
from benchmarks.serving.models import BENCH
from cluster.errors import SearchError
from jobs.config import Rung
from jobs.search.plan import plan_search

_CLAIM = "The search beside what people would use instead"
_NUM_KILLS = 10
_WHOLE_FRONT = 1000


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    seeds: Sequence[int]
    folder: Path
    plots: Path
    say: Callable[[str], None]


def compare_contenders(asked: Asked) -> dict[str, Any]:
    """Let all contenders search each seed's model, on one thread as a trial has."""
    torch.set_num_threads(1)
    by_seed = []
    for found in subjects(asked.seeds):
        compared = _compared(asked, found)
        by_seed.append({**compared, "over_others": contenders.ratios(compared["hypervolume"])})
        draw_fronts(by_seed[-1]["points"], asked.plots / f"search-seed-{found.seed}.png")
    means: dict[str, Any] = {}
    for name in by_seed[0]["over_others"]:
        values = [each["over_others"][name] for each in by_seed]
        means[f"vs_{name}"] = statistics.mean(values)
        means[f"vs_{name}_range"] = [min(values), max(values)]
    return {**means, "by_seed": by_seed}


def _compared(asked: Asked, found: Subject) -> dict[str, Any]:
    """Return what the contenders found in one seed's model, now or before by the same code."""
    config = search_config(found, asked.folder)
    remembered = Remembered(
        BENCH / "searches",
        [json.dumps(found.document()), f"optuna {optuna.__version__}"],
        (*COMPRESSION, "search", "training"),
        ("search/contenders",),
    )
    what = config.model_dump(mode="json", exclude={"output_dir", "model", "data"})
    known = remembered.read(what)
    if known is not None:
        asked.say(f"seed {found.seed}: remembered")
        return dict(json.loads(known))
    bench = contenders.Bench(plan_search(config), asked.say)
    runs = contenders.compare(bench)
    volumes = {name: bench.hypervolume(each.models) for name, each in runs.items()}
    asked.say(f"seed {found.seed}: {volumes}")
    measured = {
        "seed": found.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hypervolume": volumes,
        "models": {name: len(each.models) for name, each in runs.items()},
        "seconds": {name: each.seconds for name, each in runs.items()},
        "points": {
            name: [bench.point(model).model_dump() for model in each.models]
            for name, each in runs.items()
        },
    }
    remembered.write(what, json.dumps(measured).encode())
    return measured


def time_served(asked: Asked) -> dict[str, Any]:
    """Search the first seed's model on a cluster; time its front through Ray Serve."""
    config = search_config(subject(asked.seeds[0]), asked.folder, name="served")
    config = config.replace(served_finalists=_WHOLE_FRONT, num_trials=24)
    with cluster("search-served") as session:
        run(config, session)
    document = json.loads((Path(config.output_dir) / config.name / "search.json").read_text())
    points = [
        {
            "model": row["summary"],
            "served_ms": row["served_ms"],
            "predicted_ms": row["predicted_served_ms"],
            "base_served_ms": row["base_served_ms"],
            "requests": row["served_requests"],
            "in_process_ms": row["latency_ms"],
            "predicted_in_process_ms": row["predicted_latency_ms"],
            "latency_ratio": row["latency_ratio"],
            "error": row["predicted_served_ms"] / row["served_ms"] - 1,
        }
        for row in document["trials"]
        if row["served_ms"] is not None and row["assignment"]
    ]
    not_served = [r["summary"] for r in document["trials"] if r["on_front"] and not r["served_ms"]]
    if not_served:
        raise SearchError(f"not served, though on the front: {'; '.join(not_served)}")
    return {"latency_error": max(abs(point["error"]) for point in points), "served": points}


def kill_driver(asked: Asked) -> dict[str, Any]:
    """Kill the driver of a short search ten times."""
    found = subject(asked.seeds[0])
    config = search_config(
        found,
        asked.folder,
        name="killed",
        num_trials=16,
        layers_per_group=4,
        granularity="part",
        generations=2,
        rungs=(
            Rung(eval_sequences=16, keep_ratio=0.25),
            Rung(eval_sequences=32, keep_ratio=1.0, real=True),
        ),
        served_finalists=1,
    )
    with cluster("search-killed") as session:
        return measure_kills(config, session, _NUM_KILLS, asked.seeds[0], asked.say)


SECTIONS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "search": compare_contenders,
    "served": time_served,
    "resume": kill_driver,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the report; return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    document = document_of(_CLAIM, "search", given)
    with tempfile.TemporaryDirectory(prefix="raysmith-bench-") as work:
        plots = arguments.plots or arguments.json.parent
        asked = Asked(arguments.seeds, Path(work), plots, say_on_stderr())

        def measure(name: str) -> dict[str, Any]:
            found = SECTIONS[name](asked)
            # What is served belongs to the search's own figures.
            key = "resume" if name == "resume" else "search"
            return {key: {**document.get(key, {}), **found}}

        return run_sections(document, arguments.json, arguments.only or SECTIONS, measure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="report's file")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="sections to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="models by seed")
    parser.add_argument("--plots", type=Path, help="folder of plots; unset: beside the report")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
