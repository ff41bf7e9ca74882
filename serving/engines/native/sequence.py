"""One sequence on its way through the engine.

Holds its request, its tokens, its blocks and where it stands; `move` is the only function that
changes its state. It does not know which sequences run beside it or how tokens are computed.
"""

import secrets
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b

from serving.engines._protocol import GenerateRequest
from serving.engines.native import prefix
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.drafting import Drafting
from serving.engines.native.mailbox import Mailbox
from serving.engines.native.sampling import SamplingState


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
    State.RUNNING: {State.WAITING, State.FINISHED, State.CANCELLED},
    State.FINISHED: set[State](),
    State.CANCELLED: set[State](),
}


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it.

    `blocks` hold keys and values of its first `num_cached` tokens; `num_committed` of the blocks
    are offered to others. `num_reused` prompt tokens were found in the cache when it first ran.
    `is_answered` once its first chunk is out. The engine counts `num_counted` of its tokens as
    still to be computed.
    """

    request: GenerateRequest
    max_tokens: int
    detokenizer: Detokenizer
    sampling: SamplingState
    mailbox: Mailbox
    drafting: Drafting = field(default_factory=lambda: Drafting(0))
    state: State = State.NEW
    waiting_since_s: float = 0.0
    last_pass: int = -1
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    num_committed: int = 0
    num_reused: int | None = None
    is_answered: bool = False
    num_counted: int = 0
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    salt: bytes = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.num_prompt = len(request.prompt_tokens)
        self.tokens = [*request.prompt_tokens, *request.resumed_tokens]
        self.salt = prefix.salt(request.tenant, request.adapter)
        # As text: an integer's bytes would lose its sign, and -1 and 1 would draw the same.
        seed = secrets.token_hex() if request.seed is None else str(request.seed)
        self._draw_key = blake2b(seed.encode()).digest()

    @property
    def tenant(self) -> str:
        """Who asked."""
        return self.request.tenant

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, those of an engine before this one included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_cached

    @property
    def num_owed(self) -> int:
        """Tokens of prompt and answer still to be computed; none once the sequence has ended."""
        if self.state.is_terminal:
            return 0
        return max(self.num_prompt - self.num_cached, 0) + self.max_tokens - self.num_generated

    def draw(self, index: int) -> float:
        """Return the number in [0, 1) that decides generated token `index`; always the same one."""
        digest = blake2b(index.to_bytes(8, "little"), key=self._draw_key, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def move(self, state: State) -> None:
        """Change the state; an impossible change is a bug."""
        assert state in _NEXT[self.state], f"a sequence cannot go from {self.state} to {state}"
        self.state = state
