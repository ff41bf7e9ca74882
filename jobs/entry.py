"""What every thin main shares: options, the plan before the run, errors rendered once.

Takes a command line and three functions of one job kind; gives an exit code: 0 done, 1 the run
failed, 2 bad input, 130 interrupted. Data goes to standard output, everything else to standard
error. It does not know what any job does.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from rich.console import Console
from rich.table import Table

from cluster.config import ModelT, load_config
from cluster.errors import GateRefusedError, RaysmithError

INTERRUPTED = 130
GO_ON = "run the same command again to go on"
Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Job(Generic[ModelT]):
    """One kind of job: its config, its plan as rows to print, and its run.

    `run` returns the values that `--json` prints. `plan` must not start anything. Where `refusal`
    gives a reason, the values are printed and the job failed nevertheless.
    """

    name: str
    help: str
    config: type[ModelT]
    plan: Callable[[ModelT], Rows]
    run: Callable[[ModelT], Mapping[str, Any]]
    refusal: Callable[[Mapping[str, Any]], str | None] = lambda values: None


def run_job(job: Job[ModelT], argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, print the plan or run the job, and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{job.name}", description=job.help)
    add_options(parser)
    arguments = parser.parse_args(argv)
    return guard(lambda: _run(job, arguments))


def guard(action: Callable[[], None], *, interrupted: str = GO_ON) -> int:
    """Run `action`, render a RaysmithError or Ctrl-C on standard error, return the exit code."""
    console = Console(stderr=True)
    try:
        action()
    except RaysmithError as error:
        console.print("error:", style="bold red", end=" ", highlight=False)
        console.print(error.message, markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print(f"interrupted; {interrupted}", style="yellow")
        return INTERRUPTED
    return 0


def print_rows(title: str, rows: Rows) -> None:
    """Print name and value rows as a table on standard output."""
    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def print_plan(name: str, rows: Rows, *, as_json: bool) -> None:
    """Print the plan of a job on standard output."""
    if as_json:
        print_json(dict(rows))
    else:
        print_rows(f"{name}: plan", rows)


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")


def value_rows(values: Mapping[str, Any]) -> Rows:
    """Return values as rows to print, numbers to six digits."""
    shown = ((key, value) for key, value in values.items() if value is not None)
    return [(key.replace("_", " "), _short(value)) for key, value in shown]


def print_values(title: str, values: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a command found: a JSON document, or rows under a title."""
    if as_json:
        print_json(values)
    else:
        print_rows(title, value_rows(values))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every thin main understands."""
    parser.add_argument("--config", type=Path, help="YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, e.g. --set optimizer.lr=0.001 (repeatable)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--json", action="store_true", help="print data as JSON")


def _run(job: Job[ModelT], arguments: argparse.Namespace) -> None:
    config = load_config(job.config, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print_plan(job.name, job.plan(config), as_json=arguments.json)
        return
    values = job.run(config)
    print_values(job.name, values, as_json=arguments.json)
    if reason := job.refusal(values):
        raise GateRefusedError(reason)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
