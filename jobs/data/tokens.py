"""Packed tokens on disk: memory-mapped shards read as fixed-length training sequences.

Takes a folder that `prepare` wrote; gives sequences by index. It does not know how text became
tokens, nor in which order sequences are used: that is the sampler's.

A split is one long stream of tokens cut into shards. Sequence i holds tokens [i*T, i*T + T], T + 1
of them, so that inputs and shifted targets come from one read and every token is predicted once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.errors import DataError, IntegrityError
from cluster.storage import digest_file, read_manifest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DATA_KIND = "tokens"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest on-disk type that holds every id of a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class TokenSplit:
    """One split's stream of tokens, over one or more memory-mapped shards."""

    folder: Path
    split: Split
    vocab_size: int
    shards: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return sum(len(shard) for shard in self.shards)

    def num_sequences(self, seq_len: int) -> int:
        """Return how many sequences of `seq_len` predicted tokens there are.

        Raises DataError if there is not even one.
        """
        count = (self.num_tokens - 1) // seq_len
        if count < 1:
            raise DataError(
                f"the {self.split} split in {self.folder} has {self.num_tokens} tokens; one "
                f"sequence of seq_len={seq_len} needs {seq_len + 1}. Give more text, a larger "
                f"share to the split, or a smaller seq_len."
            )
        return count

    def sequences(self, indices: Sequence[int] | np.ndarray, seq_len: int) -> np.ndarray:
        """Return int64 tokens [n, seq_len + 1] of the sequences with these indices."""
        count = self.num_sequences(seq_len)
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= count):
            raise IndexError(f"sequence indices must be in [0, {count}), found {chosen.tolist()}")
        rows = np.empty((len(chosen), seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, chosen.tolist(), strict=True):
            self._read(index * seq_len, row)
        return rows

    def sample(self, num_sequences: int, seq_len: int, seed: int) -> np.ndarray:
        """Return int64 tokens [num_sequences, seq_len + 1] of a seeded draw from the split.

        A larger `num_sequences` extends a smaller one's. Neighbours come from one document and say
        the same twice, so none are sought.
        """
        order = np.random.default_rng(seed).permutation(self.num_sequences(seq_len))
        assert num_sequences <= len(order), f"{num_sequences} of {len(order)} sequences"
        return self.sequences(order[:num_sequences], seq_len)

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on, across shard borders."""
        filled = 0
        ends = accumulate(len(shard) for shard in self.shards)
        for shard, end in zip(self.shards, ends, strict=True):
            if filled == len(out):
                return
            if start + filled >= end:
                continue
            begin = start + filled - (end - len(shard))
            part = shard[begin : begin + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)


def open_split(folder: Path, split: Split, *, verify: bool = True) -> TokenSplit:
    """Open one split of a prepared folder.

    With `verify` every shard is compared with its digest first. Raises DataError if the folder is
    no prepared data, IntegrityError naming the shard or manifest that is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist. Give a folder that a training run prepared.")
    manifest = read_manifest(folder)
    if manifest.get("kind") != DATA_KIND:
        raise DataError(
            f"{folder} holds `{manifest.get('kind')}`, not `{DATA_KIND}`. "
            "Give the data folder of a training run."
        )
    dtype = np.dtype(manifest["dtype"])
    shards = tuple(
        _open_shard(folder / name, manifest["files"], dtype, verify=verify)
        for name in manifest["splits"][split]["shards"]
    )
    return TokenSplit(folder, split, int(manifest["vocab_size"]), shards)


def _open_shard(
    path: Path, files: dict[str, Any], dtype: np.dtype[Any], *, verify: bool
) -> np.ndarray:
    recorded = files[path.name]
    if not path.is_file():
        raise IntegrityError(f"{path} is missing. Delete {path.parent} to prepare the data again.")
    is_whole = path.stat().st_size == recorded["size_bytes"]
    if not is_whole or (verify and digest_file(path) != recorded["sha256"]):
        raise IntegrityError(
            f"{path} is damaged: it differs from its manifest. "
            f"Delete {path.parent} to prepare the data again."
        )
    return np.memmap(path, dtype=dtype, mode="r")
