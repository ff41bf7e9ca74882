"""Losses of one model on one text that were measured before; see `benchmarks._remembered`.

N sequences
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._remembered import COMPRESSION, Remembered
from cluster.storage import digest_file


def remembered(
    folder: Path, model: Path, texts: Sequence[NDArray[Any]], packages: Sequence[str] = ()
) -> Remembered:
    """Return what is remembered of a model and texts; `packages` of `jobs` decide as well."""
    inputs = [digest_file(model / name) for name in ("model.safetensors", "config.json")]
    inputs += [_digest(text) for text in texts]
    modules = ("compression/trial", "compression/contenders", "compression/remembered")
    return Remembered(folder, inputs, (*COMPRESSION, *packages), modules)


@dataclass(frozen=True)
class Measured:
    """Losses [N] of a model, and the day they were measured, as ISO 8601 writes it."""

    losses: NDArray[np.float64]
    date: str

    @classmethod
    def now(cls, losses: NDArray[np.float64]) -> "Measured":
        """Return losses that were measured just now."""
        return cls(losses, datetime.now(UTC).date().isoformat())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Measured":
        """Return what `to_bytes` wrote."""
        with np.load(io.BytesIO(data)) as found:
            return cls(found["losses"], str(found["date"]))

    def to_bytes(self) -> bytes:
        """Return them as a file that is remembered."""
        buffer = io.BytesIO()
        np.savez(buffer, losses=self.losses, date=np.array(self.date))
        return buffer.getvalue()


def _digest(values: NDArray[Any]) -> str:
    shape = f"{values.dtype} {values.shape} ".encode()
    return hashlib.sha256(shape + np.ascontiguousarray(values).tobytes()).hexdigest()
