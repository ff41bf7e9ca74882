"""Which sequences the next forward pass advances, and by how many tokens: continuous batching.

Takes sequences; gives passes. Pure bookkeeping: it does not know about tensors, models or threads.

A sequence holds a slot, and blocks for all its tokens, while it runs. The least served tenant is
admitted first, and takes slots from one that holds more than its share. When blocks run out, the
sequence that was admitted last of the tenant that holds most gives its own back and is computed
again later. How a pass is shared between running sequences is in passes.py.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from serving.engines.native.blocks import BlockManager
from serving.engines.native.passes import PassLimits, Piece, share
from serving.engines.native.sequence import Sequence, State
from serving.engines.native.tenants import Tenant, Tenants


class Scheduler:
    """Hands out slots, blocks and the token budget of every pass."""

    def __init__(
        self, size: PassLimits, blocks: BlockManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.blocks = blocks
        self._size = size
        self._clock = clock
        self._tenants = Tenants()
        self._num_passes = 0
        self.num_waiting = 0
        self.num_running = 0
        self.num_preemptions = 0
        self.waiting_since_s: float | None = None

    @property
    def num_free_slots(self) -> int:
        """Slots without a sequence."""
        return self._size.max_slots - self.num_running

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.num_waiting and not self.num_running

    @property
    def queue_age_s(self) -> float:
        """How long the oldest waiting sequence has waited, as of the last pass."""
        since_s = self.waiting_since_s
        # Who waited at the last pass may have been cancelled since, and no pass follows.
        if since_s is None or not self.num_waiting:
            return 0.0
        return self._clock() - since_s

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.move(State.WAITING)
        sequence.waiting_since_s = self._clock()
        self._tenants.enter(sequence.tenant).waiting.append(sequence)
        self.num_waiting += 1

    def schedule(self) -> list[Piece]:
        """Return the next pass: decoding sequences first, then prompts; empty only when idle."""
        self._num_passes += 1
        self._make_room()
        self._admit()
        self.waiting_since_s = self._oldest_waiting_s()
        pieces = share([t for t in self._tenants.active() if t.running], self._size)
        for piece in pieces:
            piece.sequence.last_pass = self._num_passes
        return self._allow_drafts(pieces)

    def advance(self, piece: Piece, num_accepted: int = 0) -> None:
        """Note that a piece, and so many guesses behind it that held, are in the cache.

        What follows the piece is among the sequence's tokens already, up to where it ended.
        """
        sequence = piece.sequence
        sequence.num_cached = min(piece.stop + num_accepted, len(sequence.tokens))
        if piece.is_last:
            self._tenants.get(sequence.tenant).served += 1 + num_accepted
        self.blocks.commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free what it holds."""
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
        sequences = [s for t in self._tenants.active() for s in (*t.running, *t.waiting)]
        for sequence in sequences:
            self.cancel(sequence)
        return sequences

    def _make_room(self) -> None:
        """Give every running sequence a block for its newest token, preempting where none is."""
        block_size = self.blocks.block_size
        for tenant in self._tenants.active():
            for sequence in tuple(tenant.running):
                if len(sequence.tokens) <= len(sequence.blocks) * block_size:
                    continue
                while sequence.state is State.RUNNING:
                    if self.blocks.can_extend(sequence, len(sequence.tokens)):
                        self.blocks.extend(sequence, len(sequence.tokens))
                        break
                    self._preempt(self._victim())

    def _victim(self) -> Sequence:
        running = [tenant for tenant in self._tenants.active() if tenant.running]
        return max(running, key=_num_blocks).running[-1]

    def _preempt(self, sequence: Sequence) -> None:
        tenant = self._tenants.get(sequence.tenant)
        tenant.running.remove(sequence)
        self.num_running -= 1
        self.blocks.release(sequence)
        sequence.move(State.WAITING)
        sequence.waiting_since_s = self._clock()
        tenant.waiting.appendleft(sequence)
        self.num_waiting += 1
        self.num_preemptions += 1

    def _admit(self) -> None:
        if not self.num_waiting:
            return
        computing = self._keys_being_computed()
        passed: set[str] = set()
        is_full = False
        while True:
            waiting = [t for t in self._tenants.active() if t.waiting and t.name not in passed]
            if not waiting:
                return
            tenant, sequence = waiting[0], waiting[0].waiting[0]
            key = self.blocks.next_key(sequence)
            if key is not None and key in computing:
                # Another sequence computes this very block: soon it can be taken instead.
                passed.add(tenant.name)
                continue
            if is_full or not self._has_room(sequence):
                victims = self._displaceable(tenant, sequence)
                if not victims:
                    # What becomes free is for this one; others may take from who has most.
                    is_full = True
                    passed.add(tenant.name)
                    continue
                for victim in victims:
                    self._preempt(victim)
            self._start(tenant, sequence)
            if key is not None:
                computing.add(key)

    def _keys_being_computed(self) -> set[bytes]:
        running = [s for t in self._tenants.active() for s in t.running if s.num_pending > 1]
        keys = {self.blocks.next_key(sequence) for sequence in running}
        return {key for key in keys if key is not None}

    def _has_room(self, sequence: Sequence) -> bool:
        # A block is left for each running sequence: else the next pass would preempt it.
        return self.num_free_slots > 0 and self.blocks.can_allocate(sequence, self.num_running)

    def _displaceable(self, tenant: Tenant, sequence: Sequence) -> list[Sequence]:
        """Return what to preempt so that a tenant gets its share; nothing if it has that.

        The tenant that holds most gives way as long as it keeps no less than the other then has.
        """
        others = [t for t in self._tenants.active() if t.running and t is not tenant]
        if not others:
            return []
        heaviest = max(others, key=self._share_held)
        num_missing = self.blocks.num_missing(sequence)
        num_lacking = num_missing + self.num_running - self.blocks.num_free
        victims: list[Sequence] = []
        for victim in reversed(heaviest.running):
            victims.append(victim)
            num_lacking -= self.blocks.num_released(victim) + 1
            if num_lacking <= 0:
                break
        gained = self._share_of(len(tenant.running) + 1, _num_blocks(tenant) + num_missing)
        num_kept = len(heaviest.running) - len(victims)
        kept_blocks = _num_blocks(heaviest) - sum(len(victim.blocks) for victim in victims)
        is_fair = self._share_of(num_kept, kept_blocks) >= gained
        return victims if num_lacking <= 0 and is_fair else []

    def _share_held(self, tenant: Tenant) -> float:
        return self._share_of(len(tenant.running), _num_blocks(tenant))

    def _share_of(self, num_slots: int, num_blocks: int) -> float:
        """Return the larger share, of slots or of blocks (Ghodsi et al. 2011)."""
        return max(num_slots / self._size.max_slots, num_blocks / self.blocks.num_blocks)

    def _start(self, tenant: Tenant, sequence: Sequence) -> None:
        tenant.waiting.popleft()
        self.num_waiting -= 1
        self.blocks.allocate(sequence)
        if sequence.num_reused is None:
            sequence.num_reused = min(sequence.num_cached, sequence.num_prompt)
        sequence.move(State.RUNNING)
        tenant.running.append(sequence)
        self.num_running += 1
        tenant.served += sequence.num_pending - 1  # The last one when its piece is computed.

    def _allow_drafts(self, pieces: list[Piece]) -> list[Piece]:
        left = self._size.max_draft_rows - sum(piece.length for piece in pieces)
        if left <= 0:
            return pieces
        most_each = max(1, left // max(1, len(pieces)))
        allowed = []
        for piece in pieces:
            sequence = piece.sequence
            num_left = sequence.max_tokens - sequence.num_generated - 1
            num = min(sequence.drafting.length, num_left, most_each, left) if piece.is_last else 0
            if num > 0 and self.blocks.can_extend(sequence, piece.stop + num):
                self.blocks.extend(sequence, piece.stop + num)
                left -= num
                allowed.append(replace(piece, max_drafts=num))
            else:
                allowed.append(piece)
        return allowed

    def _oldest_waiting_s(self) -> float | None:
        since_s = []
        for tenant in self._tenants.active():
            for sequence in tenant.waiting:
                since_s.append(sequence.waiting_since_s)
                if sequence.num_reused is None:
                    break  # Behind the preempted ones they wait in order of arrival.
        return min(since_s, default=None)

    def _remove(self, sequence: Sequence) -> None:
        if sequence.state is State.NEW:
            return
        tenant = self._tenants.get(sequence.tenant)
        if sequence.state is State.WAITING:
            tenant.waiting.remove(sequence)
            self.num_waiting -= 1
        elif sequence.state is State.RUNNING:
            tenant.running.remove(sequence)
            self.num_running -= 1
            self.blocks.release(sequence)
        if not tenant.is_active:
            self._tenants.leave(tenant)


def _num_blocks(tenant: Tenant) -> int:
    return sum(len(sequence.blocks) for sequence in tenant.running)
