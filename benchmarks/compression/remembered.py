"""Losses of one model on one text that were measured before; see `benchmarks._remembered`.

N sequences
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks._remembered import COMPRESSION, Remembered
from cluster.storage import digest_file


def remembered(
    folder: Path, model: Path, texts: Sequence[NDArray[Any]], packages: Sequence[str] = ()
) -> Remembered:
    """Return what is remembered of a model and texts; `packages` of `jobs` decide as well."""
    inputs = [digest_file(model / name) for name in ("model.safetensors", "config.json")]
    inputs += [_digest(text) for text in texts]
    modules = ("compression/trial", "compression/contenders")
    return Remembered(folder, inputs, (*COMPRESSION, *packages), modules)


class RememberedLosses:
    """Losses by what was done to the model."""

    def __init__(
        self, folder: Path, model: Path, sequences: NDArray[np.int64], calibration: Tensor
    ) -> None:
        self._remembered = remembered(folder, model, [sequences, calibration.numpy()])

    def read(self, what: Any) -> NDArray[np.float64] | None:
        """Return the losses [N] of what is described in full; None if they were not measured."""
        data = self._remembered.read(what)
        return None if data is None else np.load(io.BytesIO(data))

    def write(self, what: Any, losses: NDArray[np.float64]) -> None:
        """Keep the losses [N]."""
        buffer = io.BytesIO()
        np.save(buffer, losses)
        self._remembered.write(what, buffer.getvalue())


def _digest(values: NDArray[Any]) -> str:
    shape = f"{values.dtype} {values.shape} ".encode()
    return hashlib.sha256(shape + np.ascontiguousarray(values).tobytes()).hexdigest()
