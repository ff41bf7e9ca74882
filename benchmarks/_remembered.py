"""What was measured before, so that a benchmark that was cut off goes on where it was.

Takes all that a measurement depends on; gives it back if it was made on the same model, text, code,
libraries and machine. It does not know what is measured.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import jobs
from cluster.storage import write_atomic
from jobs.kernels import choices

# What decides a model's losses; the search, training and serving do not.
COMPRESSION = ("compression", "data", "evaluation", "kernels", "models")


class Remembered:
    """Bytes by what they depend on."""

    def __init__(self, folder: Path, depends_on: Sequence[str], packages: Sequence[str]) -> None:
        """Take digests of inputs, and the packages of `jobs` whose code decides."""
        environment = choices.environment(torch.device("cpu"))
        self._folder = folder
        self._depends_on = [*depends_on, sources_digest(tuple(packages)), *environment]

    def read(self, what: Any) -> bytes | None:
        """Return what was kept of this, described in full as JSON values; None: nothing."""
        path = self._path(what)
        return path.read_bytes() if path.is_file() else None

    def write(self, what: Any, data: bytes) -> None:
        """Keep it."""
        write_atomic(self._path(what), data)

    def _path(self, what: Any) -> Path:
        document = json.dumps([*self._depends_on, what], sort_keys=True)
        return self._folder / hashlib.sha256(document.encode()).hexdigest()


@functools.cache
def sources_digest(packages: tuple[str, ...]) -> str:
    """Return the digest of the code of some packages of `jobs`."""
    digest = hashlib.sha256()
    (root,) = map(Path, jobs.__path__)
    for package in packages:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
