"""One HTTP request on its way through the gateway: what each layer learns about it.

It is made by the outermost layer, filled by the others, and read by the outermost one again for
logs, metrics and traces. It does not act.
"""

import secrets
import time
from dataclasses import dataclass, field

from starlette.types import Scope

from serving.gateway.accounts import Principal
from serving.gateway.limits import Place
from serving.messages import Refused, ServedModel

_KEY = "raysmith.call"


def _new_id() -> str:
    return secrets.token_hex(12)


@dataclass
class Call:
    """One request."""

    request_id: str = field(default_factory=_new_id)
    began_at: float = field(default_factory=time.time)  # Seconds since the epoch, for logs.
    started_s: float = field(default_factory=time.monotonic)
    route: str = "other"
    principal: Principal | None = None
    secret: str = field(default="", repr=False)
    place: Place | None = None
    model: ServedModel | None = None
    body_bytes: int = 0
    prompt: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token_s: float | None = None  # After `started_s`.
    refused: Refused | None = None
    has_left: bool = False

    @property
    def team(self) -> str:
        """The team that asks, or nothing before it is known."""
        return self.principal.team if self.principal else ""

    def caller(self) -> Principal:
        """Return who asks; only where a rule demanded a key."""
        assert self.principal is not None, f"{self.route}: its rule asks for no key"
        return self.principal


def begin_call(scope: Scope) -> Call:
    """Return a new call and keep it in the scope."""
    call = Call()
    scope[_KEY] = call
    return call


def call_of(scope: Scope) -> Call:
    """Return the call of this request."""
    call = scope[_KEY]
    assert isinstance(call, Call)
    return call
