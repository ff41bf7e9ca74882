"""llama.cpp through llama-cpp-python's low-level API, with the server's way of batching.

A GGUF file in; every pass holds one token of each running sequence and of prompts what fits beside
them, a long one in parts, which is what llama.cpp's server does with `-np`.

llama.cpp computes a pass in parts of sequences with consecutive numbers (`split_equal` in its
src/llama-batch.cpp), and each part reads all weights. So that parts are few, sequences take the
lowest free number and stand in a pass in the order of theirs.
"""

import argparse
import ctypes
import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from benchmarks.peers._wire import Arrival, Clock, Run, serve


def main(argv: list[str] | None = None) -> int:
    """Answer runs with one GGUF file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=640, help="tokens of one sequence")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    return serve(lambda: _load(parser.parse_args(argv)))


def _load(arguments: argparse.Namespace) -> tuple[Run, dict[str, Any]]:
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(arguments.model).encode(), llama.llama_model_default_params()
    )
    assert model, f"{arguments.model} does not load"
    engine = _Engine(model, arguments)
    return engine.run, {"version": llama.__version__}


@dataclass
class _Slot:
    """A running request; `num_read` tokens of its prompt have been through the model."""

    arrival: Arrival
    num_read: int = 0


class _Engine:
    def __init__(self, model: Any, arguments: argparse.Namespace) -> None:
        params = llama.llama_context_default_params()
        params.n_seq_max = arguments.max_batch
        params.n_ctx = arguments.context * arguments.max_batch
        params.n_batch = arguments.batch_tokens
        params.n_ubatch = min(512, arguments.batch_tokens)
        params.n_threads = params.n_threads_batch = arguments.threads
        self._batch_tokens = params.n_batch
        self._context = llama.llama_init_from_model(model, params)
        assert self._context, "the context does not fit"
        self._memory = llama.llama_get_memory(self._context)
        vocabulary = llama.llama_model_get_vocab(model)
        self._vocab_size = llama.llama_vocab_n_tokens(vocabulary)
        self._batch = llama.llama_batch_init(self._batch_tokens, 0, 1)
        self._max_batch = arguments.max_batch

    def run(self, arrivals: list[Arrival], clock: Clock) -> None:
        waiting = list(arrivals)
        running: dict[int, _Slot] = {}
        free = list(range(self._max_batch))
        while waiting or running:
            if not running:
                clock.wait_until(waiting[0].at_s)
            while waiting and free and waiting[0].at_s <= clock.now_s():
                running[heapq.heappop(free)] = _Slot(waiting.pop(0))
            sampled = self._fill(running)
            code = llama.llama_decode(self._context, self._batch)
            assert code == 0, f"llama_decode failed with {code}"
            for number, row in sampled:
                arrival = running[number].arrival
                arrival.tokens.append(self._greedy(row))
                arrival.times_s.append(clock.now_s())
                if arrival.is_done:
                    del running[number]
                    heapq.heappush(free, number)
                    llama.llama_memory_seq_rm(self._memory, number, -1, -1)

    def _fill(self, running: dict[int, _Slot]) -> list[tuple[int, int]]:
        """Write the next pass; return the sequences that get a token from it, and their rows."""
        self._batch.n_tokens = 0
        slots = sorted(running.items())
        left = self._batch_tokens - sum(bool(slot.arrival.tokens) for _, slot in slots)
        parts: dict[int, int] = {}  # Prompts are read in the order of their arrival.
        for number, slot in running.items():
            parts[number] = min(left, len(slot.arrival.prompt) - slot.num_read)
            left -= parts[number]
        sampled = []
        for number, slot in slots:
            arrival = slot.arrival
            if arrival.tokens:
                position = len(arrival.prompt) + len(arrival.tokens) - 1
                row = self._add(arrival.tokens[-1], position, number, is_last=True)
                sampled.append((number, row))
                continue
            stop = slot.num_read + parts[number]
            for position in range(slot.num_read, stop):
                is_last = position == len(arrival.prompt) - 1
                row = self._add(arrival.prompt[position], position, number, is_last=is_last)
                if is_last:
                    sampled.append((number, row))
            slot.num_read = stop
        return sampled

    def _add(self, token: int, position: int, slot: int, *, is_last: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = slot
        batch.logits[row] = is_last
        batch.n_tokens = row + 1
        return row

    def _greedy(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        values = np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,)
        )
        return int(values.argmax())


if __name__ == "__main__":
    raise SystemExit(main())
