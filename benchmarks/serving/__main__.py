"""`python -m benchmarks.serving --json OUT`: every figure that the README claims of serving.

`--quick` measures a small model beside transformers in one process; `--only` runs some sections.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._report import document_of, run_sections, say_on_stderr
from benchmarks.serving import quick
from benchmarks.serving.peers import CASES, Case
from benchmarks.serving.sections import SECTIONS, Bench, check_ready
from cluster.errors import RaysmithError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the report; return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in given:
        return quick.main(given)
    arguments = _parser().parse_args(given)
    say = say_on_stderr()
    plots = arguments.plots or arguments.json.parent
    document = document_of("Serving beside the engines people would pick instead", "serving", given)
    names = arguments.only or tuple(SECTIONS)
    try:
        check_ready(names)
    except RaysmithError as error:
        say(f"error: {error.message}")
        return error.exit_code

    def measure(name: str) -> dict[str, Any]:
        with ExitStack() as stack:
            return SECTIONS[name](Bench(stack, arguments.rounds, arguments.cases, plots, say))

    return run_sections(document, arguments.json, names, measure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, in about a minute")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="report's file")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="sections to run")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Case.parse,
        default=CASES,
        metavar="N/IN/OUT",
        help="what `peers` asks: requests at once, tokens of prompt and answer; unset: all",
    )
    parser.add_argument("--plots", type=Path, help="folder of plots; unset: beside the report")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
