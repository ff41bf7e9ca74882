"""How a gateway waits for the ledger's steward, which is a fake here."""

import asyncio
from concurrent.futures import Future
from pathlib import Path

import pytest
from ray.exceptions import ActorUnschedulableError

from cluster.accounting import Answer, Batch
from cluster.errors import ClusterError, LedgerError
from cluster.steward import RemoteSteward, Steward, steward_name


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


def test_apply_when_its_node_is_gone_starts_another_steward_next_time():
    async def test() -> None:
        steward, actor = RemoteSteward(), FakeActor()
        steward._actor = actor
        actor.answer.set_exception(ActorUnschedulableError("its node is gone"))
        with pytest.raises(ClusterError, match="does not answer"):
            await steward.apply(Batch("w", 1))
        assert steward._actor is None

    asyncio.run(test())


def test_steward_when_it_would_open_another_ledger_than_was_meant_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSMITH_LEDGER", str(tmp_path / "meant.db"))
    name = steward_name()
    monkeypatch.setenv("RAYSMITH_LEDGER", str(tmp_path / "other.db"))
    with pytest.raises(LedgerError, match=r"other\.db.*RAYSMITH_LEDGER.*on every node"):
        Steward(None, name).apply(Batch("w", 1))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RAYSMITH_LEDGER", str(tmp_path / "meant.db"))
    meant = Steward(None, name)
    assert meant.apply(Batch("w", 1)) == Answer()
    meant._ledger.close()
