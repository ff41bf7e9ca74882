"""Accounts over the ledger: keys checked against it, limits counted here, budgets leased from it.

Takes a ledger and its steward; gives principals, reservations and usage. Reading needs no steward:
the ledger's revision is asked for with every key, so a revoked one is refused at once. It does not
know routes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

from cluster.accounting import Account, Key, Team, Used, hour_of, month_of
from cluster.errors import LedgerError, RaysmithError
from cluster.ledger import Ledger, Snapshot
from cluster.ledger_reader import LedgerReader
from serving.gateway.accounts import KEYS_UNAVAILABLE, UNAUTHORIZED, Principal, Spent
from serving.gateway.budgets import Held
from serving.gateway.errors import RefusedError
from serving.gateway.ledger_writer import LedgerWriter, Pace, Steward
from serving.gateway.rate_limits import Asked, Bound, RateLimits, Taken
from serving.messages import Refused

_logger = logging.getLogger(__name__)
_FLUSH_TIMEOUT_S = 2.0


class LedgerAccounts:
    """The gateway's `Accounts`; used on one event loop."""

    def __init__(
        self,
        ledger: str | None,
        steward: Steward,
        *,
        pace: Pace = Pace(),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the ledger. Raises ConfigError or LedgerError if that cannot be done."""
        self._ledger = Ledger.open(ledger)
        self._reader = LedgerReader(self._ledger)
        self._checks = SharedCheck(self._reader, pace.check_timeout_s)
        self._rates = RateLimits(monotonic)
        self._writer = LedgerWriter(steward, pace, monotonic)
        self._clock = clock

    async def authenticate(self, secret: str) -> Principal:
        """Return who holds this key. RefusedError (401) does not say what is wrong."""
        snapshot = await self._current()
        key = snapshot.by_digest.get(self._ledger.digest(secret))
        if key is None or not key.is_valid(self._clock()):
            raise RefusedError(UNAUTHORIZED)
        team = snapshot.teams[key.team]
        if team.is_suspended:
            raise RefusedError(UNAUTHORIZED)
        return Principal(key.id, key.team, key.scopes, team.models)

    async def reserve(
        self, principal: Principal, num_tokens: int, num_choices: int
    ) -> "LedgerReservation":
        """Hold what a request may use at most; see `Accounts.reserve`."""
        key, team = self._find(principal)
        bounds = [
            Bound(f"key `{key.id}`", key.limits),
            Bound(f"team `{team.name}`", team.limits),
        ]
        taken = self._rates.take(bounds, Asked(num_tokens, num_choices))
        month, held = month_of(self._clock()), None
        if team.tokens_per_month is not None:
            try:
                held = await self._writer.budgets.take(team, month, num_tokens)
            except BaseException:
                taken.undo()
                raise
        return LedgerReservation(self, principal, month, taken, held)

    async def usage(self, team: str) -> Mapping[str, object]:
        """Return a team's limits, budget and use of the current month, as a JSON document.

        Raises RefusedError (404) for a team that does not exist.
        """
        await self._writer.flush(_FLUSH_TIMEOUT_S)
        found = (await self._current()).teams.get(team)
        if found is None:
            message = f"there is no team `{team}`."
            raise RefusedError(Refused(HTTPStatus.NOT_FOUND, message, param="team"))
        return await asyncio.to_thread(self._document, found)

    async def aclose(self) -> None:
        """Write what is left to charge and close the ledger; call it when the gateway ends."""
        try:
            await self._writer.aclose()
        finally:
            self._reader.close()
            self._ledger.close()

    def charge(self, principal: Principal, month: str, spent: Spent) -> None:
        """Note what a request used."""
        account = Account(
            hour_of(self._clock()),
            month,
            principal.team,
            principal.key_id,
            spent.model,
            spent.version,
        )
        used = Used(1, spent.prompt_tokens, spent.generated_tokens, spent.cached_tokens)
        self._writer.charge(account, used)

    async def _current(self) -> Snapshot:
        try:
            return await self._checks.current()
        except RaysmithError as error:
            _logger.error("no key can be checked: %s", error.message)  # noqa: TRY400 - no bug
            raise RefusedError(KEYS_UNAVAILABLE) from error

    def _find(self, principal: Principal) -> tuple[Key, Team]:
        """Return a principal's key and team, unless the key has gone since it was checked."""
        snapshot = self._reader.last
        key = snapshot.keys.get(principal.key_id)
        if key is None or not key.is_valid(self._clock()):
            raise RefusedError(UNAUTHORIZED)
        return key, snapshot.teams[key.team]

    def _document(self, team: Team) -> dict[str, Any]:
        month = month_of(self._clock())
        balance = self._ledger.balance(team, month)
        rows = self._ledger.usage(month=month, by=("model", "version"), team=team.name)
        return {
            "object": "usage",
            "team": team.name,
            "month": month,
            "limits": team.limits.model_dump(),
            "budget": {
                "tokens_per_month": balance.budget,
                "spent_tokens": balance.spent,
                "leased_tokens": balance.leased,
                "remaining_tokens": balance.remaining,
            },
            "data": [
                {
                    "model": row.model,
                    "version": row.version,
                    "num_requests": row.used.num_requests,
                    "prompt_tokens": row.used.prompt_tokens,
                    "cached_tokens": row.used.cached_tokens,
                    "generated_tokens": row.used.generated_tokens,
                }
                for row in rows
            ],
        }


class LedgerReservation:
    """What one request may use at most."""

    def __init__(
        self,
        accounts: LedgerAccounts,
        principal: Principal,
        month: str,
        taken: Taken,
        held: Held | None,
    ) -> None:
        self._accounts = accounts
        self._principal = principal
        self._month = month
        self._taken = taken
        self._held = held
        self._is_settled = False

    def settle(self, spent: Spent | None) -> None:
        """Charge what was used, give the rest back; only the first call counts. Never blocks."""
        if self._is_settled:
            return
        self._is_settled = True
        tokens = 0 if spent is None else spent.prompt_tokens + spent.generated_tokens
        self._taken.release(tokens)
        if self._held is not None:
            self._held.settle(tokens)
        if spent is not None:
            self._accounts.charge(self._principal, self._month, spent)


class Reader(Protocol):
    """What is asked; `cluster.ledger_reader.LedgerReader` is one."""

    is_local: bool

    def current(self) -> Snapshot:
        """Return the teams and keys as they are now. Raises LedgerError."""
        ...


class SharedCheck:
    """Asks for the ledger's revision: at once where that is local, else for many callers in one."""

    def __init__(self, reader: Reader, timeout_s: float) -> None:
        self._reader = reader
        self._timeout_s = timeout_s
        self._running: asyncio.Task[Snapshot] | None = None
        self._next: asyncio.Task[Snapshot] | None = None

    async def current(self) -> Snapshot:
        """Return a snapshot that was current at some moment after this call.

        Raises LedgerError, also if there is no answer in time.
        """
        if self._reader.is_local:
            return self._reader.current()
        if self._next is None:  # the check that runs now may have asked before this call
            self._next = asyncio.create_task(self._check(self._running))
        try:
            async with asyncio.timeout(self._timeout_s):
                # A thread cannot be cancelled: whoever comes later waits for the same one.
                return await asyncio.shield(self._next)
        except TimeoutError:
            raise LedgerError(
                f"the ledger's server did not answer within {self._timeout_s:g} s. Check it."
            ) from None

    async def _check(self, before: asyncio.Task[Snapshot] | None) -> Snapshot:
        if before is not None:
            await asyncio.wait([before])
        self._running, self._next = self._next, None
        return await asyncio.to_thread(self._reader.current)
