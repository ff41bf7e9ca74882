"""How a gateway waits for the ledger's steward, which is a fake here."""

import asyncio
from concurrent.futures import Future

import pytest

from cluster.accounting import Answer, Batch
from cluster.steward import RemoteSteward


class FakeActor:
    """An actor with one method, whose answer the test gives."""

    def __init__(self) -> None:
        self.answer: Future[Answer] = Future()

    @property
    def apply(self) -> "FakeActor":
        return self

    def remote(self, batch: Batch) -> "FakeActor":
        assert batch.sequence == 1
        return self

    def future(self) -> Future[Answer]:
        return self.answer


def test_apply_when_cancelled_as_the_answer_comes_is_cancelled():
    async def test() -> None:
        steward, actor = RemoteSteward(), FakeActor()
        steward._actor = actor
        call = asyncio.create_task(steward.apply(Batch("w", 1)))
        await asyncio.sleep(0)
        actor.answer.set_result(Answer((5,)))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(test())


def test_apply_when_answered_returns_the_answer():
    async def test() -> None:
        steward, actor = RemoteSteward(), FakeActor()
        steward._actor = actor
        actor.answer.set_result(Answer((5,)))
        assert await steward.apply(Batch("w", 1)) == Answer((5,))

    asyncio.run(test())
