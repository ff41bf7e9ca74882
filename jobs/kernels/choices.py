"""Which operator was measured to be the fastest, remembered between processes.

Takes a problem and a choice; keeps it in the user's cache folder for the same machine, builds and
number of threads, so that a warm start measures nothing. It does not know how a choice is made.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import StorageError
from cluster.storage import write_json
from jobs.kernels import build, native
from jobs.kernels.operator import Problem

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The operator chosen, microseconds of each that was right by name, and why others were not."""

    operator: str
    microseconds: dict[str, float]
    refused: dict[str, str]


def recall(problem: Problem, num_threads: int) -> Choice | None:
    """Return the choice made for this problem here before, or None."""
    found = _read(_path(problem, num_threads)).get(_key(problem))
    if not isinstance(found, dict):
        return None
    try:
        return Choice(**found)
    except TypeError:  # written by another version: measured again
        return None


def remember(problem: Problem, num_threads: int, choice: Choice) -> None:
    """Keep a choice. Where the cache cannot be written, say so; it is measured again next time."""
    path = _path(problem, num_threads)
    # Two processes that write at once lose one of the choices, which costs a measurement.
    try:
        write_json(path, _read(path) | {_key(problem): asdict(choice)})
    except StorageError as error:
        _logger.warning("operators will be measured again at the next start: %s", error)


def _path(problem: Problem, num_threads: int) -> Path:
    document = json.dumps([*environment(problem.device), num_threads])
    digest = hashlib.sha256(document.encode()).hexdigest()[:16]
    return build.cache_folder() / "operators" / f"{digest}.json"


@functools.cache
def environment(device: torch.device) -> tuple[str, ...]:
    """Return what a measurement depends on beside problem and threads."""
    versions = [f"torch {torch.__version__}"]
    try:
        versions.append(f"zentorch {importlib.metadata.version('zentorch')}")
    except importlib.metadata.PackageNotFoundError:
        versions.append("no zentorch")
    sources = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    versions.append(f"operators {hashlib.sha256(sources).hexdigest()}")
    library = native.library_name() if native.is_available() else "no kernels"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return (build.cpu_name(), library, gpu, *versions)


def _key(problem: Problem) -> str:
    layout = problem.layout
    shape = f"{problem.out_features}x{problem.in_features}"
    return f"{layout.scheme}/{layout.group_size} {shape} {problem.dtype} {problem.device.type}"


def _read(path: Path) -> dict[str, Any]:
    """Return what a file holds; a damaged one holds nothing, and is written anew."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
