"""Monthly token budgets: requests are paid out of tokens that were leased from the ledger.

Takes requests for tokens and what the ledger granted; gives holds, and says what to lease or give
back. A lease covers many requests, so that few of them wait for the ledger, and it counts against
the budget from the moment it is granted: a budget cannot be overspent. It does no I/O itself.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from cluster.accounting import Lease, Return, Team
from serving.gateway.errors import RefusedError
from serving.messages import Refused

QUOTA_CODE = "insufficient_quota"
# A lease is for so many requests like the one that asks; the next is asked for at half of it.
REQUESTS_PER_LEASE = 32
IDLE_S = 5.0


class Budgets:
    """The leased tokens of every team and month; used on one event loop.

    `ask` is called when `leases()` has something to say.
    """

    def __init__(
        self,
        ask: Callable[[], None],
        *,
        wait_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._wait_timeout_s = wait_timeout_s
        self._clock = clock
        self._is_closed = False
        self._pools: dict[tuple[str, str], _Pool] = {}
        self._returns: Counter[tuple[str, str, int]] = Counter()
        # Grows when leases are given up: what is still held of older ones returns to the ledger.
        self._epoch = 0

    async def take(self, team: Team, month: str, num_tokens: int) -> "Held":
        """Hold tokens of a team's budget.

        Raises RefusedError: 429 `insufficient_quota` if the budget has not so many, 503 if the
        ledger does not answer in time.
        """
        budget = team.tokens_per_month
        assert budget is not None, f"team `{team.name}` has no budget to take from"
        pool = self._pools.setdefault((team.name, month), _Pool(team.name, month))
        pool.used_at_s = self._clock()
        pool.wanted = max(num_tokens * REQUESTS_PER_LEASE, pool.wanted // 2)
        pool.num_held += 1
        try:
            if pool.waiting or pool.free < num_tokens:
                epoch = await self._wait(pool, num_tokens, budget)
            else:
                pool.free -= num_tokens
                epoch = self._epoch
        except BaseException:
            pool.num_held -= 1
            raise
        if pool.is_low:
            self._ask()
        return Held(self, pool, num_tokens, epoch)

    @property
    def has_pools(self) -> bool:
        """Whether tokens are leased, so that the ledger must hear of this writer now and then."""
        return bool(self._pools)

    @property
    def has_returns(self) -> bool:
        """Whether something was spent or given back that the ledger was not told yet."""
        return bool(self._returns)

    def leases(self) -> list[Lease]:
        """Return what to ask the ledger for; call `granted` with its answer before asking again."""
        if self._is_closed:
            return []
        pools = [pool for _, pool in sorted(self._pools.items()) if pool.is_low]
        return [pool.lease(self._epoch) for pool in pools]

    def granted(self, leases: Sequence[Lease], granted: Sequence[int]) -> None:
        """Take what the ledger granted; whom it has not enough for is refused.

        Whoever still waits though the ledger gave what was asked for is asked for again.
        """
        for lease, tokens in zip(leases, granted, strict=True):
            pool = self._pools[lease.team, lease.month]
            if lease.epoch != self._epoch:  # leases were given up while this one was under way
                self._give_back(pool, tokens, lease.epoch)
                self._ask()
            else:
                pool.fill(tokens, lease)
                if pool.waiting:
                    self._ask()

    def returns(self) -> list[Return]:
        """Return, once, what was spent of leases, and what idle teams do not need any more."""
        now_s = self._clock()
        for key, pool in list(self._pools.items()):
            if pool.num_held == 0 and now_s - pool.used_at_s >= IDLE_S:
                del self._pools[key]
                self._give_back(pool, pool.free, self._epoch)
        returns, self._returns = self._returns, Counter()
        return [Return(*key, tokens) for key, tokens in sorted(returns.items())]

    def drop(self) -> None:
        """Give up every lease: the ledger may have, as it has not heard of us for so long."""
        for pool in self._pools.values():
            self._give_back(pool, pool.free, self._epoch)
            pool.free = 0
        self._epoch += 1

    def close(self) -> None:
        """Give up every lease and take no more."""
        self._is_closed = True
        self.drop()

    def settle(self, held: "Held", used: int) -> None:
        """End a hold; the caller charges what was used before this returns to the event loop."""
        pool = held.pool
        pool.num_held -= 1
        pool.used_at_s = self._clock()
        extra = max(0, used - held.num_tokens)  # more than it held: what else is leased pays for it
        paid = min(extra, pool.free) if held.epoch == self._epoch else 0
        pool.free -= paid
        self._give_back(pool, used - extra + paid, held.epoch)
        self._refund(pool, held.num_tokens - (used - extra), held.epoch)

    def _refund(self, pool: "_Pool", tokens: int, epoch: int) -> None:
        if epoch == self._epoch:
            pool.free += tokens
            pool.serve(epoch)
        else:
            self._give_back(pool, tokens, epoch)

    def _give_back(self, pool: "_Pool", tokens: int, epoch: int) -> None:
        if tokens > 0:
            self._returns[pool.team, pool.month, epoch] += tokens

    async def _wait(self, pool: "_Pool", num_tokens: int, budget: int) -> int:
        """Wait for tokens, and return the epoch of the lease that they are of."""
        waiter = _Waiter(num_tokens, asyncio.get_running_loop().create_future())
        pool.waiting.append(waiter)
        self._ask()
        is_answered = False
        try:
            # Not wait_for: it loses a cancellation that comes with the answer (cpython#86296).
            async with asyncio.timeout(self._wait_timeout_s):
                epoch = await waiter.future
            is_answered = True
        except TimeoutError:
            message = "the ledger does not answer, so the budget cannot be checked."
            refused = Refused(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after_s=1)
            raise RefusedError(refused) from None
        finally:
            if not is_answered:
                self._abandon(pool, waiter)
        if epoch is None:
            message = (
                f"team `{pool.team}` has a budget of {budget} tokens in {pool.month}; what is left "
                f"of it does not cover the {num_tokens} that this request may use. Ask for fewer "
                "tokens, or have the budget raised."
            )
            refused = Refused(HTTPStatus.TOO_MANY_REQUESTS, message, code=QUOTA_CODE)
            raise RefusedError(refused)
        return epoch

    def _abandon(self, pool: "_Pool", waiter: "_Waiter") -> None:
        """Forget who waits no longer; what it was granted at the last moment is free again."""
        if waiter in pool.waiting:
            pool.waiting.remove(waiter)
            pool.serve(self._epoch)  # Those behind it may need less.
        if waiter.epoch is not None:
            self._refund(pool, waiter.num_tokens, waiter.epoch)


@dataclass(eq=False)
class Held:
    """Tokens held for one request."""

    budgets: Budgets
    pool: "_Pool"
    num_tokens: int
    epoch: int

    def settle(self, used_tokens: int) -> None:
        """End the hold: the rest is free again. The caller charges what was used, in one go."""
        self.budgets.settle(self, used_tokens)


@dataclass(eq=False)
class _Waiter:
    """A request without tokens; `future` gives the epoch of the lease it got them of, or None."""

    num_tokens: int
    future: "asyncio.Future[int | None]"
    is_asked_for: bool = False
    epoch: int | None = None


@dataclass(eq=False)
class _Pool:
    """Leased tokens of one team and month."""

    team: str
    month: str
    free: int = 0
    wanted: int = 0
    used_at_s: float = 0.0
    num_held: int = 0  # requests that hold tokens or wait for some
    is_exhausted: bool = False
    waiting: deque[_Waiter] = field(default_factory=deque)

    @property
    def is_low(self) -> bool:
        """Whether to ask for more: ahead of need, unless the ledger had no more to give."""
        return bool(self.waiting) or (self.free < self.wanted // 2 and not self.is_exhausted)

    def lease(self, epoch: int) -> Lease:
        for waiter in self.waiting:
            waiter.is_asked_for = True
        needed = max(0, sum(waiter.num_tokens for waiter in self.waiting) - self.free)
        return Lease(self.team, self.month, epoch, needed, max(needed, self.wanted))

    def fill(self, tokens: int, lease: Lease) -> None:
        """Add tokens; where the ledger had fewer than needed, whom they do not reach is refused.

        In order: what does not cover one may cover the next.
        """
        self.free += tokens
        self.is_exhausted = tokens < lease.wanted
        self.serve(lease.epoch)
        while tokens < lease.needed and (first := self._first()) and first.is_asked_for:
            self._end(first, None)
            self.serve(lease.epoch)

    def serve(self, epoch: int) -> None:
        """Let those who wait go on, in order, as far as the tokens reach.

        Nobody is overtaken: tokens that come back would go to small requests until the lease that
        was asked for a large one does not cover it any more.
        """
        while (first := self._first()) and first.num_tokens <= self.free:
            self.free -= first.num_tokens
            self._end(first, epoch)

    def _first(self) -> _Waiter | None:
        """Return who is next; one that was cancelled a moment ago is not."""
        return next((waiter for waiter in self.waiting if not waiter.future.done()), None)

    def _end(self, waiter: _Waiter, epoch: int | None) -> None:
        self.waiting.remove(waiter)
        waiter.epoch = epoch
        if not waiter.future.done():
            waiter.future.set_result(epoch)
