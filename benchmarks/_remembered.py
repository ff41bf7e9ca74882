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
from benchmarks._report import describe_versions
from cluster.storage import write_atomic
from jobs.kernels import choices

# What decides a model's losses; the search, training and serving do not.
COMPRESSION = ("compression", "config", "data", "evaluation", "kernels", "models")
_HERE = Path(__file__).parent


class Remembered:
    """Bytes by what they depend on."""

    def __init__(
        self, folder: Path, inputs: Sequence[str], packages: Sequence[str], modules: Sequence[str]
    ) -> None:
        """Take digests of inputs, and the code that decides.

        That is packages of `jobs` and modules of `benchmarks`, as paths below them.
        """
        (root,) = map(Path, jobs.__path__)
        sources = [root / package for package in packages]
        sources += [_HERE / f"{module}.py" for module in modules]
        environment = choices.environment(torch.device("cpu"))
        self._folder = folder
        self._depends_on = [*inputs, _digest(tuple(sources)), *environment, describe_versions()]

    def read(self, what: Any) -> bytes | None:
        """Return what was kept of this, described in full as JSON values; None: nothing."""
        path = self.path(what)
        return path.read_bytes() if path.is_file() else None

    def write(self, what: Any, data: bytes) -> None:
        """Keep it."""
        write_atomic(self.path(what), data)

    def path(self, what: Any) -> Path:
        """Return where it is kept, whether it is there or not."""
        document = json.dumps([*self._depends_on, what], sort_keys=True)
        return self._folder / hashlib.sha256(document.encode()).hexdigest()


@functools.cache
def _digest(sources: tuple[Path, ...]) -> str:
    """Return the digest of the code in some files and folders."""
    digest = hashlib.sha256()
    for source in sources:
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        code = [path for path in files if path.suffix in (".py", ".cpp", ".h")]
        assert code, f"there is no code in {source}"
        for path in code:
            digest.update(f"{path.relative_to(_HERE.parent)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
