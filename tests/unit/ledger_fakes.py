"""A clock that only the test moves, stewards that fail when told to, accounts over a ledger."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from cluster.accounting import Answer, Batch, Key, Scope, Team, month_of
from cluster.errors import ClusterError
from cluster.ledger import Ledger
from serving.gateway.accounts import Spent
from serving.gateway.accounts_client import LedgerAccounts
from serving.gateway.errors import RefusedError
from serving.gateway.ledger_writer import Pace
from serving.messages import Refused

Test = Callable[[LedgerAccounts], Awaitable[None]]
QUICK = Pace(gather_s=0.001, first_retry_s=0.001, lease_timeout_s=0.05, close_timeout_s=0.05)


def key_of(team: str, **changes: object) -> Key:
    """A key that a ledger can be asked to make."""
    return Key(id="", team=team, scopes=frozenset({Scope.INFERENCE})).replace(**changes)


class Clock:
    """A time that only the test moves."""

    def __init__(self, now_s: float = 1_795_000_000.25) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class FakeSteward:
    """Writes at once, and remembers the batches. `held` batches wait for it to be set."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.batches: list[Batch] = []
        self.held: asyncio.Event | None = None
        self.was_asked = asyncio.Event()

    async def apply(self, batch: Batch) -> Answer:
        self.was_asked.set()
        if self.held is not None:
            await self.held.wait()
        self.batches.append(batch)
        return self.ledger.apply(batch)


class FlakySteward(FakeSteward):
    """Loses every other call: half of these before the batch is written, half of them after."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._fates: Iterator[str] = self._cycle()

    async def apply(self, batch: Batch) -> Answer:
        fate = next(self._fates)
        if fate == "before":
            raise ClusterError("the steward was killed")
        answer = await super().apply(batch)
        if fate == "after":
            raise ClusterError("the answer was lost")
        return answer

    @staticmethod
    def _cycle() -> Iterator[str]:
        while True:
            yield from ("before", "none", "after", "none")


class DeadSteward:
    """Never answers."""

    async def apply(self, batch: Batch) -> Answer:
        raise ClusterError("the steward is away")


class Service:
    """A ledger with a team and a key, and accounts over it."""

    def __init__(self, url: str, **team: Any) -> None:
        self.url = url
        self.clock, self.monotonic = Clock(), Clock(100.0)
        self.ledger = Ledger.open(url, clock=self.clock)
        self.ledger.add_team(Team(name="a", **team))
        self.key, self.secret = self.new_key()
        self.steward: Any = FakeSteward(self.ledger)

    def new_key(self, team: str = "a", **changes: Any) -> tuple[Key, str]:
        return self.ledger.new_key(key_of(team, **changes))

    def run(self, test: Test, pace: Pace = Pace()) -> None:
        async def run() -> None:
            clocks = {"clock": self.clock, "monotonic": self.monotonic}
            accounts = LedgerAccounts(self.url, self.steward, pace=pace, **clocks)
            try:
                await test(accounts)
            finally:
                await accounts.aclose()

        asyncio.run(run())

    @property
    def month(self) -> str:
        return month_of(self.clock())

    @property
    def balance(self) -> tuple[int, int]:
        found = self.ledger.balance(self.ledger.team("a"), self.month)
        return found.spent, found.leased

    @property
    def num_requests(self) -> int:
        rows = self.ledger.usage(month=self.month, by=())
        return sum(row.used.num_requests for row in rows)


async def refusal(call: Awaitable[Any]) -> Refused:
    with pytest.raises(RefusedError) as caught:
        await call
    return caught.value.refused


def spent(tokens: int) -> Spent:
    return Spent("tiny", "3", tokens - 1, 1)
