"""Blocks of the cache: which sequence holds which, and which hold what a later one can reuse.

Takes sequences; gives them block numbers. Pure bookkeeping: it does not know about tensors, or
which sequence deserves to run. Every verb has its opposite: allocate and extend, release; commit a
block for reuse, evict it.

A block is free, held by one or several sequences, or idle: held by none, but still full of keys and
values that a prompt with the same beginning can take. Idle blocks go, the least recently used
first, when no free one is left.
"""

from itertools import takewhile

from serving.engines.native.prefix import extend_keys
from serving.engines.native.sequence import Sequence


class BlockManager:
    """Hands out the blocks of one cache."""

    def __init__(self, num_blocks: int, block_size: int, *, is_prefix_cached: bool = True) -> None:
        assert num_blocks > 0, f"num_blocks={num_blocks} must be positive"
        assert block_size > 0, f"block_size={block_size} must be positive"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_prefix_cached = is_prefix_cached
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # In order of last use.
        self._is_drafted = [False] * num_blocks  # A draft model has read it too.

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def next_key(self, sequence: Sequence) -> bytes | None:
        """Return the key of the first block that a sequence has yet to compute for others.

        None where no later sequence could take it: prefixes are not kept, or the block is not full.
        """
        if not self._is_prefix_cached:
            return None
        self._extend_keys(sequence)
        if sequence.blocks:
            index = sequence.num_cached // self.block_size
        else:
            index = len(self._find(sequence))
        is_reusable = index < self._num_reusable(sequence) and index < len(sequence.block_keys)
        return sequence.block_keys[index] if is_reusable else None

    def num_missing(self, sequence: Sequence) -> int:
        """Return how many free blocks a waiting sequence would take, found ones included."""
        found = self._find(sequence)
        num_held = sum(self._num_holders[block] > 0 for block in found)
        return self.blocks_for(len(sequence.tokens)) - num_held

    def can_allocate(self, sequence: Sequence, num_reserved: int = 0) -> bool:
        """Return whether a waiting sequence fits, with `num_reserved` blocks left for others."""
        return self.num_missing(sequence) + num_reserved <= self.num_free

    def allocate(self, sequence: Sequence) -> None:
        """Give a waiting sequence blocks for all its tokens; those found need no computation."""
        assert not sequence.blocks, "a sequence that holds blocks is extended"
        found = self._find(sequence)
        for block in found:
            self._idle.pop(block, None)
            self._num_holders[block] += 1
        sequence.blocks.extend(found)
        sequence.num_cached = len(found) * self.block_size
        sequence.num_committed = len(found)
        drafted = takewhile(self._is_drafted.__getitem__, found)
        sequence.drafting.num_draft_cached = sum(1 for _ in drafted) * self.block_size
        self.extend(sequence, len(sequence.tokens))

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether a sequence can hold this many tokens in all."""
        return self.blocks_for(num_tokens) - len(sequence.blocks) <= self.num_free

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Give a sequence more blocks, until it can hold this many tokens in all."""
        for _ in range(self.blocks_for(num_tokens) - len(sequence.blocks)):
            sequence.blocks.append(self._take())

    def commit(self, sequence: Sequence) -> None:
        """Offer the full blocks that a sequence has computed to later ones."""
        num_full = sequence.num_cached // self.block_size
        if not self._is_prefix_cached or num_full == sequence.num_committed:
            return
        self._extend_keys(sequence)
        for index in range(sequence.num_committed, num_full):
            key, block = sequence.block_keys[index], sequence.blocks[index]
            if key not in self._block_of:  # Else another sequence computed the same meanwhile.
                self._block_of[key] = block
                self._key_of[block] = key
                num_tokens = (index + 1) * self.block_size
                self._is_drafted[block] = num_tokens <= sequence.drafting.num_draft_cached
        sequence.num_committed = num_full

    def num_released(self, sequence: Sequence) -> int:
        """Return how many blocks nobody would hold if this sequence gave its own back."""
        return sum(self._num_holders[block] == 1 for block in sequence.blocks)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence back; what it committed can still be found."""
        for block in reversed(sequence.blocks):  # A chain's end is useless without its beginning.
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None
        sequence.blocks.clear()
        sequence.num_cached = sequence.num_committed = 0

    def _take(self) -> int:
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._num_holders[block] = 1
        return block

    def _evict(self) -> None:
        assert self._idle, "the caller asks can_allocate or can_extend first"
        block = next(iter(self._idle))
        del self._idle[block]
        key = self._key_of[block]
        assert key is not None, "an idle block has a key"
        del self._block_of[key]
        self._key_of[block] = None
        self._free.append(block)

    def _find(self, sequence: Sequence) -> list[int]:
        """Return the blocks that hold the longest known beginning of a sequence."""
        if not self._is_prefix_cached:
            return []
        self._extend_keys(sequence)
        found = []
        for key in sequence.block_keys[: self._num_reusable(sequence)]:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def _num_reusable(self, sequence: Sequence) -> int:
        # The last token is always computed: the next one follows from its hidden state.
        return (len(sequence.tokens) - 1) // self.block_size

    def _extend_keys(self, sequence: Sequence) -> None:
        extend_keys(sequence.block_keys, sequence.tokens, self.block_size, sequence.salt)
