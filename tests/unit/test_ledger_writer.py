"""What a gateway tells the ledger, where the steward, the caller or the time gives out."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_fakes import QUICK, DeadSteward, FakeSteward, Service

from cluster.accounting import Account, Answer, Batch, Used
from cluster.ledger import Ledger
from serving.gateway.ledger_writer import LedgerWriter, Pace

ACCOUNT = Account(498_611, "2026-11", "a", "key-1", "tiny", "3")
SOON = Pace(gather_s=0.001, first_retry_s=0.001)


class BrokenSteward(FakeSteward):
    """Fails twice as nobody foresaw: before a batch is written, and after."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.num_calls = 0

    async def apply(self, batch: Batch) -> Answer:
        self.num_calls += 1
        if self.num_calls == 1:
            raise ValueError("not foreseen")
        answer = await super().apply(batch)
        if self.num_calls == 2:
            raise OSError("not foreseen either")
        return answer


class LeavingSteward:
    """Answers in the moment in which it has a task cancelled."""

    task: "asyncio.Task[bool]"

    async def apply(self, batch: Batch) -> Answer:
        self.task.cancel()
        return Answer()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = Service(str(tmp_path / "ledger.db"))
    yield found
    found.ledger.close()


def used(tokens: int) -> Used:
    return Used(1, tokens - 1, 1, 0)


def test_writer_when_the_steward_fails_unforeseen_writes_the_batch_once(
    service: Service, caplog: pytest.LogCaptureFixture
):
    steward = BrokenSteward(service.ledger)

    async def test() -> None:
        writer = LedgerWriter(steward, SOON)
        writer.charge(ACCOUNT, used(7))
        assert await writer.flush(5.0)
        writer.charge(ACCOUNT, used(8))
        await writer.aclose()

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    assert service.balance == (15, 0)
    assert steward.num_calls == 4
    assert "ValueError: not foreseen" in caplog.text


def test_aclose_when_a_request_settles_during_the_last_batch_writes_it_too(service: Service):
    async def test() -> None:
        service.steward.held = asyncio.Event()
        writer = LedgerWriter(service.steward, SOON)
        writer.charge(ACCOUNT, used(7))
        closing = asyncio.create_task(writer.aclose())
        await service.steward.was_asked.wait()
        writer.charge(ACCOUNT, used(8))
        service.steward.held.set()
        await closing

    asyncio.run(test())
    assert service.balance == (15, 0)


def test_aclose_when_the_steward_is_away_logs_everything_that_is_not_written(
    caplog: pytest.LogCaptureFixture,
):
    async def test() -> None:
        writer = LedgerWriter(DeadSteward(), QUICK)
        writer.charge(ACCOUNT, used(7))
        closing = asyncio.create_task(writer.aclose())
        await asyncio.sleep(0.01)
        writer.charge(ACCOUNT, used(8))
        await closing
        writer.charge(ACCOUNT, used(9))

    with caplog.at_level(logging.ERROR):
        asyncio.run(test())
    assert [record.getMessage() for record in caplog.records] == [
        "the ledger did not answer; 15 tokens are not charged",
        "the ledger is closed; 9 tokens are not charged",
    ]


def test_flush_when_cancelled_as_it_ends_is_cancelled():
    async def test() -> None:
        steward = LeavingSteward()
        writer = LedgerWriter(steward, SOON)
        writer.charge(ACCOUNT, used(7))
        steward.task = asyncio.create_task(writer.flush(5.0))
        with pytest.raises(asyncio.CancelledError):
            await steward.task
        await writer.aclose()

    asyncio.run(test())
