"""Tokenize in parallel: batches of texts in, packed token bytes out, in order.

Takes a tokenizer file and texts; gives bytes. It does not know files or splits beyond passing them
through, and imports little, because every process that is started imports it anew.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cluster.errors import TrainingError
from jobs.data.tokens import Split

Batch = tuple[list[Split], list[str]]
Encoded = tuple[list[Split], list[bytes]]


@dataclass(frozen=True)
class EncodeJob:
    """How texts become tokens: which file, which type, what goes around each document."""

    tokenizer_json: Path
    dtype: str
    begin_id: int | None
    end_id: int


class Encoder:
    """Turn batches of texts into packed tokens, in order."""

    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self._tokenizer = Tokenizer.from_file(str(job.tokenizer_json))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return each text's tokens as bytes, with the begin and end tokens around it."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        head = [] if self._job.begin_id is None else [self._job.begin_id]
        return [
            np.array([*head, *encoding.ids, self._job.end_id], dtype=self._job.dtype).tobytes()
            for encoding in encodings
        ]


def encode_all(batches: Iterator[Batch], job: EncodeJob, num_processes: int) -> Iterator[Encoded]:
    """Yield encoded batches in order; a single batch or process needs no pool."""
    head = list(islice(batches, 2))
    if num_processes == 1 or len(head) < 2:
        encoder = Encoder(job)
        for splits, texts in chain(head, batches):
            yield splits, encoder.encode(texts)
        return
    # Spawn, not fork: the caller may hold threads, and a forked lock never opens again.
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start, (job,))
    try:
        yield from _through_pool(pool, chain(head, batches), window=2 * num_processes)
    except BrokenProcessPool as error:
        raise TrainingError(
            f"one of {num_processes} tokenizing processes ended abruptly. If memory ran out, lower "
            "data.num_processes; in a script of your own, put the call under "
            "`if __name__ == '__main__':`."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _through_pool(
    pool: ProcessPoolExecutor, batches: Iterable[Batch], window: int
) -> Iterator[Encoded]:
    waiting: deque[tuple[list[Split], Future[list[bytes]]]] = deque()
    for splits, texts in batches:
        waiting.append((splits, pool.submit(_encode, texts)))
        if len(waiting) >= window:
            first, future = waiting.popleft()
            yield first, future.result()
    for splits, future in waiting:
        yield splits, future.result()


_encoder: Encoder | None = None


def _start(job: EncodeJob) -> None:
    """Prepare this process; each process is one thread, the pool is the parallelism."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(job)


def _encode(texts: Sequence[str]) -> list[bytes]:
    """Encode with the tokenizer that `_start` loaded."""
    assert _encoder is not None, "_start runs first in every process"
    return _encoder.encode(texts)
