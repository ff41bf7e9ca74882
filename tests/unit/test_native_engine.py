"""How the native engine ends when its model does not compute; the contract holds for the rest."""

import asyncio

import pytest

from cluster.errors import EngineError
from serving.engines._protocol import EngineInfo, GenerateRequest
from serving.engines.native.engine import NativeEngine
from serving.engines.native.runner import Sampled
from serving.engines.native.scheduler import Scheduler


class FakeRunner:
    """Gives `token_id` after every complete piece, or raises `error`."""

    def __init__(self, token_id: int | None = 7, error: Exception | None = None) -> None:
        self.token_id = token_id
        self.error = error

    def run(self, pieces):
        if self.error is not None:
            raise self.error
        return [Sampled(piece.sequence, self.token_id, None) for piece in pieces if piece.is_last]


@pytest.fixture
def runner():
    return FakeRunner()


@pytest.fixture
def engine(runner):
    info = EngineInfo("native", 300, 64, 2, 1, 1, {}, {})
    engine = NativeEngine(runner, Scheduler(2, 16), info, decoder=None)
    yield engine
    engine.close()


def ask(engine) -> list[int]:
    async def run():
        request = GenerateRequest(prompt_tokens=(5, 6), max_tokens=3)
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    return asyncio.run(run())


def test_generate_when_logits_are_not_finite_ends_that_sequence_only(engine, runner):
    runner.token_id = None
    with pytest.raises(EngineError, match="not finite"):
        ask(engine)
    runner.token_id = 7
    assert ask(engine) == [7, 7, 7]
    assert engine.stats().num_free_slots == 2


def test_generate_when_the_model_raises_ends_and_stays_ended_with_the_reason(engine, runner):
    runner.error = RuntimeError("out of memory")
    with pytest.raises(EngineError, match="RuntimeError: out of memory"):
        ask(engine)
    runner.error = None
    with pytest.raises(EngineError, match="out of memory"):
        ask(engine)
    with pytest.raises(EngineError, match="out of memory"):
        engine.stats()
