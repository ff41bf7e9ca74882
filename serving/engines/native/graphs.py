"""Decode passes as recordings: a pass of one token a sequence, recorded once and replayed after.

Takes parts of sequences; gives their hidden states, or nothing where a pass is of another kind. On
CUDA a recording is a graph: thousands of small kernels start by one call, which Python could not
start as fast as they run. It does not know about sampling, nor how attention works.

A recording has fixed shapes, so passes are filled up: to the next number of sequences on a ladder
by repeating the last one, which writes the same keys and values to the same place again, and to
the next number of blocks a sequence. Inputs lie in one piece of memory that all recordings read.

N sequences (T = N tokens, B = 1), P blocks of each, C hidden width
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from jobs.kernels.block_cache import BlockCache
from serving.engines.native.runner import Chunked, Model

_logger = logging.getLogger(__name__)
_WARM_UPS = 2  # The libraries choose algorithms and take memory before anything is recorded.
_TOKEN, _POSITION, _BLOCKS = 0, 1, 2  # Columns of a row of inputs.

Replay = Callable[[], Tensor]


class Recorder(Protocol):
    """Turns a function that reads fixed memory into one that does the same again."""

    def record(self, function: Replay) -> Replay:
        """Return a function that gives the same tensor, with new contents, each time.

        Raises RuntimeError if the function cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs, which share their working memory: they are replayed one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Replay) -> Replay:
        """Return the replay of a graph; what it gives is overwritten by the next replay."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch gives none
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True)
class GraphLimits:
    """The largest pass that is recorded."""

    max_sequences: int
    max_blocks: int


class DecodeGraphs:
    """Recordings of one model over one cache."""

    def __init__(
        self,
        model: Model,
        cache: BlockCache,
        limits: GraphLimits,
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._cache = cache
        self._recorder = recorder
        self._batches = ladder(limits.max_sequences)
        self._lengths = ladder(limits.max_blocks)
        size = limits.max_sequences * (_BLOCKS + limits.max_blocks)
        self._inputs = torch.zeros(size, dtype=torch.int64, device=device)
        self._replays: dict[tuple[int, int], Replay] = {}
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why nothing is recorded any more, or None."""
        return self._failure

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the smallest pass, to find out whether recording works; no sequence may run."""
        self._inputs.zero_()
        self._replay(1, 1)

    def run(self, parts: Seq[Chunked]) -> Tensor | None:
        """Compute parts, write them into the cache and return their h_TC, until the next run.

        None if the pass is not one token of each of a number of sequences, or cannot be recorded.
        """
        if self._failure is not None or any(len(part.tokens) > 1 for part in parts):
            return None
        num_blocks = max(part.start // self._cache.block_size for part in parts) + 1
        if len(parts) > self._batches[-1] or num_blocks > self._lengths[-1]:
            return None
        num_rows = _step(self._batches, len(parts))
        num_blocks = _step(self._lengths, num_blocks)
        rows = [_row(part, num_blocks) for part in parts]
        rows.extend([rows[-1]] * (num_rows - len(rows)))
        self._view(num_rows, num_blocks).copy_(torch.tensor(rows))
        replay = self._replay(num_rows, num_blocks)
        return None if replay is None else replay()[: len(parts)]

    def _replay(self, num_rows: int, num_blocks: int) -> Replay | None:
        """Return the recording of this size, made now if it is the first pass of its kind."""
        key = num_rows, num_blocks
        if key not in self._replays:
            inputs_NX = self._view(num_rows, num_blocks)
            try:
                self._replays[key] = self._recorder.record(lambda: self._compute(inputs_NX))
            except RuntimeError as error:
                self._failure = f"{type(error).__name__}: {error}"
                _logger.warning(
                    "decode passes are not replayed from now on: recording one of %d sequences "
                    "with %d blocks failed: %s",
                    num_rows,
                    num_blocks,
                    error,
                )
        return self._replays.get(key)

    def _compute(self, inputs_NX: Tensor) -> Tensor:
        positions_N = inputs_NX[:, _POSITION]
        attention = self._cache.decode_attention(inputs_NX[:, _BLOCKS:], positions_N)
        tokens_BT = inputs_NX[:, _TOKEN].contiguous()[None]
        return self._model.hidden(tokens_BT, positions_N.contiguous()[None], attention)[0]

    def _view(self, num_rows: int, num_blocks: int) -> Tensor:
        width = _BLOCKS + num_blocks
        return self._inputs[: num_rows * width].view(num_rows, width)


def ladder(largest: int) -> tuple[int, ...]:
    """Return sizes up to `largest`, each at most half as large again as the one before.

    1, 2, 3, 4, 6, 8, 12, 16, ...: little is filled up, and there are few.
    """
    assert largest > 0, f"largest={largest} must be positive"
    powers = [1 << exponent for exponent in range(largest.bit_length())]
    sizes = {size for power in powers for size in (power, power * 3 // 2) if size < largest}
    return (*sorted(sizes), largest)


def _step(sizes: Seq[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


def _row(part: Chunked, num_blocks: int) -> list[int]:
    """Return a row of inputs; blocks that are not read are filled up with the first one."""
    blocks = part.sequence.blocks[:num_blocks]
    return [part.tokens[0], part.start, *blocks, *(num_blocks - len(blocks)) * blocks[:1]]
