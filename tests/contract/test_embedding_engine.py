"""What an embedding engine must do, over a tiny published encoder; one line per behaviour."""

import asyncio
import threading
from functools import partial

import pytest
import torch
from tiny_models import publish

from cluster.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    IntegrityError,
    RequestError,
)
from jobs.compress import compress
from jobs.config import CompressConfig, Recipe, Step
from jobs.models.encoder import EncoderConfig, build, load, save
from serving.engines._protocol import EngineInfo
from serving.engines.native import create
from serving.engines.native.config import EngineConfig
from serving.engines.native.embedding import NativeEmbedder, create_embedder

SHAPE = EncoderConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_positions=64,
    max_seq_len=48,
    initializer_range=0.1,
)
INPUTS = [tuple((7 * i + j) % 298 + 2 for j in range(1 + 3 * i)) for i in range(15)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return publish(directory, partial(save, build(SHAPE, seed=3), dtype=torch.float32))


@pytest.fixture(scope="module")
def reference(directory):
    with torch.inference_mode():
        model = load(directory)
        return {tokens: model([tokens])[0] for tokens in INPUTS}


@pytest.fixture(scope="module")
def engine(directory):
    engine = create_embedder(directory, EngineConfig(max_batch_tokens=64, dtype="float32"))
    yield engine
    engine.close()


class Gate:
    """Computes vectors [tokens, 0], each pass only when it is let through."""

    def __init__(self):
        self.passes = []
        self.started = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def __call__(self, inputs):
        self.passes.append(list(inputs))
        self.started.release()
        assert self.allowed.acquire(timeout=30)
        return torch.tensor([[float(len(tokens)), 0.0] for tokens in inputs])


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def gated(gate):
    info = EngineInfo("native", 300, 64, 64, 1, 0, {}, {}, task="embed")
    engine = NativeEmbedder(gate, info, max_batch_tokens=10)
    yield engine
    for _ in range(100):
        gate.allowed.release()
    engine.close()


def test_embed_when_many_ask_at_once_equals_each_alone(engine, reference):
    async def ask_all():
        return await asyncio.gather(*(engine.embed([tokens]) for tokens in INPUTS))

    for tokens, (vector,) in zip(INPUTS, asyncio.run(ask_all()), strict=True):
        torch.testing.assert_close(torch.tensor(vector), reference[tokens], atol=1e-5, rtol=0)


def test_embed_when_one_call_has_many_inputs_keeps_their_order(engine, reference):
    vectors = torch.tensor(asyncio.run(engine.embed(INPUTS)))
    expected = torch.stack([reference[tokens] for tokens in INPUTS])
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(INPUTS)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # zentorch's first import
def test_embed_when_model_is_quantized_is_close_to_the_dense_one(directory, reference, tmp_path):
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))
    target = tmp_path / "small"
    compress(CompressConfig(model=str(directory), output=str(target), recipe=recipe))
    engine = create_embedder(target, EngineConfig())
    vectors = torch.tensor(asyncio.run(engine.embed(INPUTS)))
    engine.close()
    expected = torch.stack([reference[tokens] for tokens in INPUTS])
    assert (vectors * expected).sum(dim=-1).min() > 0.999
    assert set(engine.info().schemes.values()) == {"w8a8"}


def test_embed_when_no_input_is_given_returns_nothing(engine):
    assert asyncio.run(engine.embed([])) == []


@pytest.mark.parametrize("token", [-1, 300])
def test_embed_when_token_is_not_in_the_vocabulary_is_refused(engine, token):
    with pytest.raises(RequestError, match=f"token id {token}"):
        asyncio.run(engine.embed([(5, token)]))


def test_embed_when_input_is_empty_is_refused(engine):
    with pytest.raises(RequestError, match="empty"):
        asyncio.run(engine.embed([()]))


def test_embed_when_input_is_too_long_is_refused(engine):
    with pytest.raises(ContextLengthError, match="48 tokens; an input has 49"):
        asyncio.run(engine.embed([(5,) * 49]))


def test_info_when_asked_describes_the_model(engine):
    info = engine.info()
    assert (info.task, info.vocab_size, info.max_len) == ("embed", 300, 48)
    assert info.weight_bytes > 0


def test_embed_when_calls_wait_computes_them_together_up_to_the_budget(gated, gate):
    async def ask():
        first = asyncio.create_task(gated.embed([(1,)]))
        await asyncio.to_thread(gate.started.acquire)
        others = [asyncio.create_task(gated.embed([(2,) * n])) for n in (4, 6, 3, 20, 1)]
        await asyncio.sleep(0)
        stats = gated.stats()
        for _ in range(100):
            gate.allowed.release()
        return stats, await asyncio.gather(first, *others)

    stats, answers = asyncio.run(ask())
    assert [vector[0] for (vector,) in answers] == [1, 4, 6, 3, 20, 1]
    assert [[len(t) for t in tokens] for tokens in gate.passes] == [[1], [4, 6], [3], [20], [1]]
    assert (stats.num_running, stats.tokens_in_flight) == (1, 35)


def test_embed_when_a_call_exceeds_the_budget_is_computed_in_several_passes(gated, gate):
    for _ in range(100):
        gate.allowed.release()
    vectors = asyncio.run(gated.embed([(1,) * 6, (1,) * 4, (1,) * 5]))
    assert [vector[0] for vector in vectors] == [6, 4, 5]
    assert [[len(t) for t in tokens] for tokens in gate.passes] == [[6, 4], [5]]


def test_embed_when_cancelled_is_not_computed(gated, gate):
    async def ask():
        first = asyncio.create_task(gated.embed([(1,)]))
        await asyncio.to_thread(gate.started.acquire)
        gone = asyncio.create_task(gated.embed([(2,) * 5]))
        stays = asyncio.create_task(gated.embed([(3,) * 2]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        for _ in range(100):
            gate.allowed.release()
        return await asyncio.gather(first, stays)

    asyncio.run(ask())
    assert gate.passes == [[(1,)], [(3, 3)]]
    assert gated.stats().tokens_in_flight == 0
    assert gated.stats().prompt_tokens == 3


def test_embed_when_tenants_ask_for_unequal_amounts_gives_the_least_served_its_turn(gated, gate):
    async def ask():
        first = asyncio.create_task(gated.embed([(1,)], "large"))
        await asyncio.to_thread(gate.started.acquire)
        large = [asyncio.create_task(gated.embed([(2,) * 5] * 4, "large")) for _ in range(2)]
        await asyncio.sleep(0)
        small = asyncio.create_task(gated.embed([(3,) * 5, (4,) * 3], "small"))
        await asyncio.sleep(0)
        for _ in range(100):
            gate.allowed.release()
        return await asyncio.gather(first, *large, small)

    answers = asyncio.run(ask())
    assert [tokens[0] for tokens in gate.passes[1] + gate.passes[2]] == [2, 3, 2, 4]
    assert [len(tokens) for tokens in gate.passes[3]] == [5, 5]
    assert [[vector[0] for vector in vectors] for vectors in answers] == [
        [1],
        [5] * 4,
        [5] * 4,
        [5, 3],
    ]
    stats = gated.stats()
    assert (stats.tokens_in_flight, stats.num_waiting, stats.prompt_tokens) == (0, 0, 49)


def test_embed_when_a_tenant_asks_for_much_keeps_its_calls_in_order(gated, gate):
    async def ask():
        first = asyncio.create_task(gated.embed([(1,)], "a"))
        await asyncio.to_thread(gate.started.acquire)
        calls = [asyncio.create_task(gated.embed([(n,) * 10], "a")) for n in range(2, 6)]
        await asyncio.sleep(0)
        for _ in range(100):
            gate.allowed.release()
        await asyncio.gather(first, *calls)

    asyncio.run(ask())
    assert [tokens[0] for (tokens,) in gate.passes] == [1, 2, 3, 4, 5]


def test_embed_when_the_model_raises_ends_all_calls_and_stays_ended():
    def fail(inputs):
        raise RuntimeError("out of memory")

    info = EngineInfo("native", 300, 64, 64, 1, 0, {}, {}, task="embed")
    engine = NativeEmbedder(fail, info, max_batch_tokens=10)
    for _ in range(2):
        with pytest.raises(EngineError, match="RuntimeError: out of memory"):
            asyncio.run(engine.embed([(1,) * 8, (1,) * 8]))
    with pytest.raises(EngineError, match="out of memory"):
        engine.stats()
    engine.close()


def test_close_when_calls_wait_ends_them_and_refuses_new_ones(gated, gate):
    async def close_while_waiting():
        calls = [asyncio.create_task(gated.embed([(1,) * 9])) for _ in range(3)]
        await asyncio.to_thread(gate.started.acquire)
        closing = asyncio.create_task(asyncio.to_thread(gated.close))
        while gated._thread._commands.empty():  # noqa: ASYNC110 - the engine offers no event for it
            await asyncio.sleep(0)
        gate.allowed.release()
        await closing
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(close_while_waiting())
    assert sum(isinstance(outcome, EngineError) for outcome in outcomes) == 2
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(gated.embed([(1,)]))
    gated.close()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "1_Pooling/config.json"])
def test_create_when_a_file_is_damaged_is_refused(directory, tmp_path, name):
    for path in directory.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(directory)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        create(tmp_path, {})


def test_create_when_an_option_is_of_decoders_only_is_refused(directory):
    options = EngineConfig(max_slots=4, enable_prefix_cache=False)
    with pytest.raises(ConfigError, match="has no enable_prefix_cache, max_slots"):
        create_embedder(directory, options)


def test_create_when_directory_holds_an_encoder_makes_an_engine_that_embeds(directory, reference):
    engine = create(directory, {})
    vectors = torch.tensor(asyncio.run(engine.embed(INPUTS)))
    engine.close()
    expected = torch.stack([reference[tokens] for tokens in INPUTS])
    assert (vectors * expected).sum(dim=-1).min() > 0.999  # In bfloat16 where that is fast.
