"""Write one split's tokens as shards of bounded size.

Takes encoded documents in order; gives files and their summary. It does not know how they are read.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cluster.storage import MIB
from jobs.data.tokens import Split


class SplitWriter:
    """Append documents to a split's shards; a new shard starts once one is full."""

    def __init__(
        self, folder: Path, split: Split, dtype: str, *, max_shard_bytes: int = 256 * MIB
    ) -> None:
        self.num_documents = 0
        self._folder = folder
        self._split = split
        self._token_bytes = np.dtype(dtype).itemsize
        self._max_shard_bytes = max_shard_bytes
        self._names: list[str] = []
        self._num_bytes = 0
        self._shard_bytes = 0
        self._file: BinaryIO | None = None

    def add(self, tokens: bytes) -> None:
        """Append one document's packed tokens."""
        if self._file is None or self._shard_bytes >= self._max_shard_bytes:
            self._start_shard()
        assert self._file is not None, "a shard was just started"
        self._file.write(tokens)
        self._shard_bytes += len(tokens)
        self._num_bytes += len(tokens)
        self.num_documents += 1

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says about this split."""
        return {
            "shards": list(self._names),
            "num_tokens": self._num_bytes // self._token_bytes,
            "num_documents": self.num_documents,
        }

    def _start_shard(self) -> None:
        self.close()
        name = f"{self._split}-{len(self._names):05d}.bin"
        self._file = (self._folder / name).open("wb")
        self._names.append(name)
        self._shard_bytes = 0
