"""Which sequences the next forward pass advances, and by how many tokens: continuous batching.

Takes sequences; gives batches. Pure bookkeeping: it does not know about tensors, models or threads.

Every running sequence that has its prompt behind it gets one token in every pass, so that new
prompts never stall it. What is left of the token budget goes to prompts, first come first served,
in pieces if need be. A sequence holds one cache slot from its first piece to its end.
"""

import heapq
from collections import deque
from dataclasses import dataclass

from serving.engines.native.sequence import Sequence, State


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) of a sequence; `is_last` if the next token follows from it."""

    sequence: Sequence
    start: int
    length: int
    is_last: bool


class Scheduler:
    """Hands out slots and the token budget of every pass."""

    def __init__(self, max_slots: int, max_batch_tokens: int) -> None:
        assert max_batch_tokens >= max_slots, "every running sequence needs a token in every pass"
        self._max_batch_tokens = max_batch_tokens
        self._free_slots = list(range(max_slots))  # A heap: low slots first keeps the cache dense.
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        """Slots without a sequence."""
        return len(self._free_slots)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.move(State.WAITING)
        self._waiting.append(sequence)

    def schedule(self) -> list[Piece]:
        """Return the next pass: decoding sequences first, then prompts; empty only when idle."""
        self._admit()
        decoding = [s for s in self._running if s.num_pending == 1]
        prefilling = [s for s in self._running if s.num_pending > 1]
        pieces = [Piece(s, s.num_cached, 1, is_last=True) for s in decoding]
        budget = self._max_batch_tokens - len(pieces)
        for sequence in prefilling:
            length = min(sequence.num_pending, budget)
            if length == 0:
                break
            is_last = length == sequence.num_pending
            pieces.append(Piece(sequence, sequence.num_cached, length, is_last))
            budget -= length
        return pieces

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its slot."""
        self._remove(sequence)
        sequence.move(State.FINISHED)

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands; nothing happens if it has ended."""
        if sequence.state.is_terminal:
            return
        self._remove(sequence)
        sequence.move(State.CANCELLED)

    def cancel_all(self) -> list[Sequence]:
        """Take every sequence out and return them."""
        sequences = [*self._running, *self._waiting]
        for sequence in sequences:
            self.cancel(sequence)
        return sequences

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free_slots)
            sequence.move(State.RUNNING)
            self._running.append(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is State.RUNNING:
            self._running.remove(sequence)
            assert sequence.slot is not None, "a running sequence has a slot"
            heapq.heappush(self._free_slots, sequence.slot)
            sequence.slot = None
