"""`python -m jobs.publish --config f.yaml`: put a model that passed the gate into the registry.

Takes a model directory and a PublishConfig; gives the registry's entry. Whether a model is good
enough was decided where it was measured: here its manifest must say so.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, ModelFormatError
from cluster.storage import read_manifest, resolve_output
from jobs.config import PublishConfig
from jobs.entry import Job, Rows, run_job
from jobs.evaluation.gate import require_passed
from jobs.registry import Entry, Registry


def publish(source: Path, config: PublishConfig) -> Entry:
    """Publish a model directory, and promote it if the config says so.

    Raises GateRefusedError if its manifest has no passing verdict, IntegrityError if a file is
    damaged, VersionExistsError if the version exists. On any failure nothing was published.
    """
    _require_directory(source)
    require_passed(read_manifest(source), str(source))  # the registry checks every file
    registry = Registry(resolve_output(config.registry))
    entry = registry.publish(source, config.name, config.version)
    return registry.promote(entry.name, entry.version) if config.promote else entry


def plan_rows(config: PublishConfig) -> Rows:
    """Return what would be published; refuse what the gate refused."""
    source = _source(config)
    verdict = require_passed(read_manifest(source), str(source))
    numbers = ((key, f"{value:g}") for key, value in verdict.numbers.items() if value is not None)
    return [
        ("model", str(source)),
        ("registry", str(resolve_output(config.registry))),
        ("name", f"{config.name}@{config.version or 'the next number'}"),
        ("promote", str(config.promote)),
        *numbers,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Publish a model; return the exit code."""
    return run_job(JOB, argv)


def _run(config: PublishConfig) -> Mapping[str, Any]:
    return publish(_source(config), config).model_dump(mode="json")


def _source(config: PublishConfig) -> Path:
    if config.model is None:
        raise ConfigError("`model` is required and not set: the directory to publish.")
    source = resolve_output(config.model)
    _require_directory(source)
    return source


def _require_directory(source: Path) -> None:
    if not source.is_dir():
        raise ModelFormatError(f"{source}: no such directory. Give the directory of a model.")


JOB = Job(
    name="publish",
    help="Publish a model that passed the gate.",
    config=PublishConfig,
    plan=plan_rows,
    run=_run,
)


if __name__ == "__main__":
    sys.exit(main())
