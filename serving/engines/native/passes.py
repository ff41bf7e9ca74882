"""How one forward pass is shared between running sequences.

Takes tenants with their sequences and the limits of a pass; gives a piece for each sequence that
the pass advances. Pure: it does not know about blocks, admission or tensors.

Every running sequence that has its prompt behind it gets one token in every pass, so that new
prompts never stall it. What is left of the token budget goes to prompts, in pieces if need be, the
least served tenant's first. A tenant with many more sequences than another is held back, where it
would slow that one down; its sequences then take turns.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from serving.engines.native.sequence import Sequence
from serving.engines.native.tenants import Tenant, limits


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, start + length) of a sequence; `is_last` if the next token follows from it.

    Up to `max_drafts` guesses may be checked behind the last one: there is room for them.
    """

    sequence: Sequence
    start: int
    length: int
    is_last: bool
    max_drafts: int = 0

    @property
    def stop(self) -> int:
        """Where the piece ends."""
        return self.start + self.length


@dataclass(frozen=True)
class PassLimits:
    """How much runs at a time; see `EngineConfig` for what each means."""

    max_slots: int
    max_batch_tokens: int
    max_shared_tokens: int | None = None
    max_draft_rows: int = 0

    def __post_init__(self) -> None:
        assert self.max_batch_tokens >= self.max_slots, "every sequence needs a token in every pass"


def share(tenants: Seq[Tenant], size: PassLimits) -> list[Piece]:
    """Return the next pass of tenants that run, the least served one first."""
    budget = left = size.max_batch_tokens
    num_sequences = {t.name: len(t.running) + len(t.waiting) for t in tenants}
    allowed = limits(num_sequences, budget, size.max_shared_tokens)
    free = [tenant for tenant in tenants if allowed[tenant.name] == budget]
    pieces = [
        Piece(s, s.num_cached, 1, is_last=True)
        for tenant in free
        for s in tenant.running
        if s.num_pending == 1
    ]
    left -= len(pieces)
    for tenant in tenants:
        if allowed[tenant.name] < budget:
            turns = sorted(tenant.running, key=lambda s: s.last_pass)
            left -= _take_turns(turns, min(allowed[tenant.name], left), pieces)
    for tenant in free:
        prompts = [s for s in tenant.running if s.num_pending > 1]
        left -= _take_turns(prompts, left, pieces)
    return pieces


def _take_turns(sequences: list[Sequence], budget: int, pieces: list[Piece]) -> int:
    """Add a piece of each sequence while the budget lasts; return the tokens taken."""
    left = budget
    for sequence in sequences:
        length = min(sequence.num_pending, left)
        if length == 0:
            break
        is_last = length == sequence.num_pending
        pieces.append(Piece(sequence, sequence.num_cached, length, is_last))
        left -= length
    return budget - left
