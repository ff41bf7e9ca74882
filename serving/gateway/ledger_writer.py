"""What a gateway tells the ledger: charges and leases, gathered into batches, sent until answered.

Takes charges; gives the steward one batch at a time, made of what gathered while the last one was
under way. A batch keeps its number until it is answered, so that a steward that was restarted in
the middle neither loses nor doubles it. It does not know keys, limits or HTTP.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.accounting import WRITER_TTL_S, Account, Answer, Batch, Charge, Used
from cluster.errors import RaysmithError
from serving.gateway.budgets import IDLE_S, Budgets

_logger = logging.getLogger(__name__)
_HEARTBEAT_S = WRITER_TTL_S / 5
_LEASES_END_S = WRITER_TTL_S * 0.8


@dataclass(frozen=True)
class Pace:
    """How long charges gather, an answer is waited for, and a gateway takes to end."""

    gather_s: float = 0.2
    first_retry_s: float = 0.05
    last_retry_s: float = 2.0
    lease_timeout_s: float = 5.0
    check_timeout_s: float = 5.0  # For a key, where the ledger is on a server.
    close_timeout_s: float = 10.0


class Steward(Protocol):
    """The ledger's writer; `cluster.steward.RemoteSteward` reaches it."""

    async def apply(self, batch: Batch) -> Answer:
        """Write a batch, unless it was written before. Raises RaysmithError: send it again."""
        ...


class LedgerWriter:
    """One gateway's side of its conversation with the steward; used on one event loop."""

    def __init__(
        self,
        steward: Steward,
        pace: Pace = Pace(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steward = steward
        self._pace = pace
        self._clock = clock
        self.budgets = Budgets(self.wake, wait_timeout_s=pace.lease_timeout_s, clock=clock)
        self._charges: dict[Account, Used] = {}
        self._name = uuid.uuid4().hex
        self._sequence = 0
        self._unanswered: tuple[Charge, ...] = ()
        self._answered_at_s = clock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._flushes: list[asyncio.Future[None]] = []
        self._is_closed = False

    def charge(self, account: Account, used: Used) -> None:
        """Note what was used; it is written within a fraction of a second. Never blocks."""
        if self._is_closed:
            _logger.error("the ledger is closed; %d tokens are not charged", used.tokens)
            return
        before = self._charges.get(account)
        self._charges[account] = used if before is None else before + used
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pace.gather_s, self.wake)
        self._start()

    def wake(self) -> None:
        """Send what there is as soon as the last batch is answered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()
        self._start()

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything noted so far is written; return whether it was in time."""
        flushed = asyncio.get_running_loop().create_future()
        self._flushes.append(flushed)
        self.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await flushed
        return flushed.done() and not flushed.cancelled()

    async def aclose(self) -> None:
        """Write what is left, give leases back, and stop; what cannot be written is logged."""
        self.budgets.close()
        is_written = False
        try:
            is_written = await self._flush_all(self._pace.close_timeout_s)
        finally:
            self._is_closed = True  # No await since it was found that nothing is left.
            if not is_written:
                unwritten = [charge.used for charge in self._unanswered]
                num_tokens = sum(used.tokens for used in [*unwritten, *self._charges.values()])
                _logger.error("the ledger did not answer; %d tokens are not charged", num_tokens)
            if self._timer is not None:
                self._timer.cancel()
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])

    async def _flush_all(self, timeout_s: float) -> bool:
        """Flush until nothing is left, for requests settle while a batch is under way."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while await self.flush(end_s - loop.time()):
            if not self._charges and not self.budgets.has_returns:
                return True
        return False

    def _start(self) -> None:
        if self._is_closed:
            return
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            # Not wait_for: it loses a cancellation that comes with the event (cpython#86296).
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S if self.budgets.has_pools else None):
                    await self._wake.wait()
            self._wake.clear()
            flushes, self._flushes = self._flushes, []
            batch = self._next_batch()
            if batch is not None:
                answer = await self._deliver(batch)
                self.budgets.granted(batch.leases, answer.granted)
            for flushed in flushes:
                if not flushed.done():
                    flushed.set_result(None)

    def _next_batch(self) -> Batch | None:
        """Return what is to be said, or None if that is nothing."""
        charges, self._charges = self._charges, {}
        returns, leases = self.budgets.returns(), self.budgets.leases()
        is_due = self.budgets.has_pools and self._silent_s() > _HEARTBEAT_S
        if not (charges or returns or leases or is_due):
            return None
        self._sequence += 1
        return Batch(
            self._name,
            self._sequence,
            tuple(Charge(account, used) for account, used in charges.items()),
            tuple(returns),
            tuple(leases),
        )

    async def _deliver(self, batch: Batch) -> Answer:
        """Send a batch until it is answered."""
        retry_s, self._unanswered = self._pace.first_retry_s, batch.charges
        while True:
            try:
                answer = await self._steward.apply(batch)
            except Exception as error:  # Whatever it is, the batch must be written.
                if retry_s == self._pace.first_retry_s:
                    is_bug = not isinstance(error, RaysmithError)
                    reason = "the ledger is asked until it answers: %s"
                    _logger.warning(reason, error, exc_info=error if is_bug else None)
                if self._silent_s() > _LEASES_END_S:
                    self.budgets.drop()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, self._pace.last_retry_s)
            else:
                self._answered_at_s, self._unanswered = self._clock(), ()
                return answer

    def _silent_s(self) -> float:
        return self._clock() - self._answered_at_s
