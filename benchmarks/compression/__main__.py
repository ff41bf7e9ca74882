"""`python -m benchmarks.compression --json OUT`: every figure that is claimed of compression.

Quality is measured on self-trained models (`subject.py`), size and speed on a large one of random
weights. `--only` runs some sections; the report is written after each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._report import document_of, run_sections, say_on_stderr
from benchmarks.compression import gate, plots, quality
from benchmarks.compression.sections import SECTIONS, Bench
from benchmarks.compression.subject import STEPS
from cluster.errors import ConfigError

_CLAIM = "Compression: quality with intervals, size and speed"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the report; return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    document = document_of(_CLAIM, "compression", given)
    folder = arguments.plots or arguments.json.parent
    claims: dict[str, Any] = {}
    names = arguments.only or list(SECTIONS)
    if "gate" in names and arguments.sequences is not None:
        try:
            gate.check_enough(arguments.sequences)
        except ConfigError as error:  # Before an hour of the other sections.
            say_on_stderr()(f"error: {error.message}")
            return error.exit_code
    bench = Bench(
        arguments.seeds,
        arguments.steps,
        arguments.sequences,
        arguments.calibration,
        arguments.rounds,
        say_on_stderr(),
    )

    def measure(name: str) -> dict[str, Any]:
        section, found = SECTIONS[name](bench)
        facts, of_facts = bench.facts()
        claims.update({claim.name: claim.document() for claim in (*of_facts, *found)})
        section = {**facts, **section, "claims": claims}
        if bench.has_trials:
            section["contenders"] = quality.contenders(bench.trials)
            plots.draw(section["contenders"], folder / "compression.png")
        return section

    exit_code = run_sections(document, arguments.json, names, measure)
    _print_claims(claims)
    return exit_code


def _print_claims(claims: dict[str, dict[str, Any]]) -> None:
    table = Table(title=_CLAIM)
    for heading in ("figure", "found", "limit", ""):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, claim in claims.items():
        kind = "at_most" if "at_most" in claim else "at_least"
        limit = f"{kind.replace('_', ' ')} {claim[kind]:g}"
        table.add_row(name, f"{claim['found']:.4g}", limit, "" if claim["is_met"] else "missed")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="report's file")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="sections to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="models by seed")
    parser.add_argument("--steps", type=int, default=STEPS, help="that the models are trained")
    parser.add_argument("--rounds", type=int, default=5, help="turns of what is timed")
    parser.add_argument(
        "--calibration", type=int, default=128, help="sequences of 256 tokens that methods see"
    )
    parser.add_argument(
        "--sequences", type=int, help="held-out sequences of 256 tokens; unset: the whole split"
    )
    parser.add_argument("--plots", type=Path, help="folder of plots; unset: beside the report")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
