"""Losses of one model on one text that were measured before; see `benchmarks._remembered`.

N sequences
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks._remembered import COMPRESSION, Remembered
from cluster.storage import digest_file


class RememberedLosses:
    """Losses by what was done to the model."""

    def __init__(
        self, folder: Path, model: Path, sequences: NDArray[np.int64], calibration: Tensor
    ) -> None:
        depends_on = [
            digest_file(model / "model.safetensors"),
            digest_file(model / "config.json"),
            _digest(sequences),
            _digest(calibration.numpy()),
        ]
        self._remembered = Remembered(folder, depends_on, COMPRESSION)

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
