"""What every benchmark shares: alternating measurement, and a report that can be repeated.

Takes contenders as functions; gives rates with their spread, and a document that carries hardware,
versions, command, date and configuration. It does not know what is measured.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from cluster.errors import RaysmithError
from cluster.storage import write_json

_PACKAGES = ("raysmith", "torch", "transformers", "accelerate", "ray", "zentorch", "numpy")

Rates = Mapping[str, Sequence[float]]


def parse_arguments(claim: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return `quick`, `json` and `threads` from a command line."""
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--quick", action="store_true", help="a small model, in about a minute")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report to this file")
    parser.add_argument("--threads", type=int, help="threads of torch; unset: as torch decides")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: give a number of at least 1")
    return arguments


def run_benchmark(
    claim: str,
    module: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    argv: Sequence[str] | None,
) -> int:
    """Measure, print a table and write the report; return the process's exit code."""
    arguments = parse_arguments(claim, argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    given = sys.argv[1:] if argv is None else argv
    try:
        document = {**document_of(claim, module, given), **measure(arguments)}
        if arguments.json is not None:
            write_json(arguments.json, document)
    except RaysmithError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    print_cases(claim, document["cases"])
    return 0


def document_of(claim: str, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what every report begins with: claim, command, date, hardware, versions."""
    return {
        "claim": claim,
        "command": f"python -m benchmarks.{module} {shlex.join(arguments)}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": describe_versions(),
    }


def say_on_stderr() -> Callable[[str], None]:
    """Return what prints a line of progress, as it is."""
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return say


def run_sections(
    document: dict[str, Any],
    out: Path,
    names: Iterable[str],
    measure: Callable[[str], Mapping[str, Any]],
) -> int:
    """Measure sections by name and write the report after each; return the exit code.

    What a section returns is added to `document`, where it replaces what an earlier one said.
    """
    say = say_on_stderr()
    try:
        for name in names:
            say(f"== {name}")
            document.update(measure(name))
            write_json(out, document)
    except RaysmithError as error:
        say(f"error: {error.message}")
        return error.exit_code
    return 0


def alternate(
    contenders: Mapping[str, Callable[[], float]], rounds: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Return each contender's rates, measured in turn so that a slow spell meets all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmups + rounds):
        for name, measure in contenders.items():
            rate = measure()
            if turn >= warmups:
                rates[name].append(rate)
    return rates


def rate_of(work: Callable[[], int]) -> float:
    """Return how much work was done per second; `work` returns how much there was."""
    start_s = time.perf_counter()
    amount = work()
    return amount / (time.perf_counter() - start_s)


def describe_case(
    name: str, config: Mapping[str, Any], rates: Rates, baseline: str
) -> dict[str, Any]:
    """Return one case: every contender's median, spread and ratio to `baseline`.

    Ratios are taken round by round, between neighbours in time, and their median is reported.
    """
    ratios = {
        contender: [rate / base for rate, base in zip(values, rates[baseline], strict=True)]
        for contender, values in rates.items()
    }
    return {
        "name": name,
        "config": dict(config),
        "unit": "tokens/s",
        "baseline": baseline,
        "contenders": {
            contender: {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "rates": list(values),
                "ratio_to_baseline": statistics.median(ratios[contender]),
                "ratios": ratios[contender],
            }
            for contender, values in rates.items()
        },
    }


def describe_hardware() -> dict[str, Any]:
    """Return what the numbers depend on: processor, cores in use, memory, accelerator."""
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores_usable": len(psutil.Process().cpu_affinity()) if _has_affinity() else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": psutil.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_versions() -> dict[str, str | None]:
    """Return the versions of Python and of what is compared."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def print_cases(claim: str, cases: Sequence[Mapping[str, Any]]) -> None:
    """Print one row a case and contender: median, spread, ratio."""
    table = Table(title=claim)
    for heading in ("case", "contender", "tokens/s", "lowest - highest", "ratio", "its range"):
        table.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for case in cases:
        for contender, found in case["contenders"].items():
            table.add_row(
                case["name"],
                contender,
                f"{found['median']:.0f}",
                f"{found['lowest']:.0f} - {found['highest']:.0f}",
                f"{found['ratio_to_baseline']:.2f}",
                f"{min(found['ratios']):.2f} - {max(found['ratios']):.2f}",
            )
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _has_affinity() -> bool:
    return hasattr(psutil.Process(), "cpu_affinity")


def _cpu_name() -> str:
    """Return the CPU's name; with family and model, since machines for rent do not say more."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in first.splitlines()
            if ":" in line
        )
        if name := fields.get("model name"):
            numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
            return f"{name} ({', '.join(numbers)})" if numbers else name
    return platform.processor() or platform.machine()
