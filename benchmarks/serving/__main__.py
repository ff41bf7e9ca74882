"""`python -m benchmarks.serving --json OUT`: every figure that the README claims of serving.

`--quick` measures a small model beside transformers in one process; `--only` runs some sections.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks._report import document_of
from benchmarks.serving import quick
from benchmarks.serving.peers import CASES, Case
from benchmarks.serving.sections import SECTIONS, Bench, check_ready
from cluster.errors import RaysmithError
from cluster.storage import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the report; return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in given:
        return quick.main(given)
    arguments = _parser().parse_args(given)
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    plots = arguments.plots or arguments.json.parent
    document = document_of("Serving beside the engines people would pick instead", "serving", given)
    try:
        names = arguments.only or tuple(SECTIONS)
        check_ready(names)
        for name in names:
            say(f"== {name}")
            with ExitStack() as stack:
                bench = Bench(stack, arguments.rounds, arguments.cases, plots, say)
                document |= SECTIONS[name](bench)
            write_json(arguments.json, document)
    except RaysmithError as error:
        console.print(f"error: {error.message}", markup=False, soft_wrap=True)
        return error.exit_code
    return 0


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
