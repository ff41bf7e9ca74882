"""Who may ask for what, and what it costs them: the seam between HTTP and the ledger."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from cluster.accounting import Scope as Scope
from serving.messages import Refused

# It does not say what is wrong with a key.
UNAUTHORIZED = Refused(
    HTTPStatus.UNAUTHORIZED,
    "no valid API key. Send the header `Authorization: Bearer KEY`.",
    code="invalid_api_key",
)
KEYS_UNAVAILABLE = Refused(
    HTTPStatus.SERVICE_UNAVAILABLE, "the server cannot check API keys now.", retry_after_s=1
)


@dataclass(frozen=True)
class Principal:
    """Whoever holds a valid key. `models` None: every model."""

    key_id: str
    team: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None


@dataclass(frozen=True)
class Spent:
    """Tokens that one request used, to be charged."""

    model: str
    version: str
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0


class Reservation(Protocol):
    """Tokens, a request and places held for one request until it is settled."""

    def settle(self, spent: Spent | None) -> None:
        """Charge what was used, give the rest back; None: nothing was used. Never blocks.

        Only the first call counts.
        """
        ...


class Accounts(Protocol):
    """Keys, limits and budgets."""

    async def authenticate(self, secret: str) -> Principal:
        """Return who holds this key. RefusedError (401) does not say what is wrong."""
        ...

    async def reserve(self, principal: Principal, num_tokens: int, num_choices: int) -> Reservation:
        """Hold what a request may use at most.

        Raises RefusedError (429 with the time to wait, or `insufficient_quota`) that names the
        limit, its value and whose it is.
        """
        ...

    async def aclose(self) -> None:
        """Write what is not charged yet; call it once, after the last request."""
        ...

    async def usage(self, team: str) -> Mapping[str, object]:
        """Return a team's limits, budget and use of the current month, as a JSON document."""
        ...
