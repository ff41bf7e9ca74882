"""One sequence on its way through the engine.

Holds its request, its tokens and where it stands; `move` is the only function that changes its
state. It does not know which sequences run beside it or how tokens are computed.
"""

import random
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from cluster.errors import EngineError
from serving.engines._protocol import Chunk, GenerateRequest
from serving.engines.native.detokenizer import Detokenizer


class State(Enum):
    """Where a sequence stands."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing more happens to the sequence."""
        return self in (State.FINISHED, State.CANCELLED)


_NEXT = {
    State.NEW: {State.WAITING, State.CANCELLED},
    State.WAITING: {State.RUNNING, State.CANCELLED},
    State.RUNNING: {State.FINISHED, State.CANCELLED},
    State.FINISHED: set[State](),
    State.CANCELLED: set[State](),
}


class Deliver(Protocol):
    """Hands one result to whoever asked for the sequence; called on the engine's thread."""

    def __call__(self, item: Chunk | EngineError) -> None:
        """Take the next chunk, or the error that ended the sequence."""
        ...


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it."""

    request: GenerateRequest
    max_tokens: int
    detokenizer: Detokenizer
    deliver: Deliver
    state: State = State.NEW
    slot: int | None = None
    num_cached: int = 0
    tokens: list[int] = field(init=False)
    draws: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_tokens)
        seed = self.request.seed
        # As text: an integer seed would lose its sign, and -1 and 1 would draw the same.
        self.draws = random.Random(None if seed is None else str(seed))

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_tokens)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_cached

    def move(self, state: State) -> None:
        """Change the state; an impossible change is a bug."""
        assert state in _NEXT[self.state], f"a sequence cannot go from {self.state} to {state}"
        self.state = state
