"""What the native engine does around its model; the contract has the rest."""

import asyncio
import threading

import pytest
from engine_fakes import VOCABULARY

from cluster.errors import EngineError, RequestError
from serving.engines._protocol import Chunk, EngineInfo, FinishReason, GenerateRequest
from serving.engines.native.answers import Vocabulary
from serving.engines.native.blocks import BlockManager
from serving.engines.native.engine import NativeEngine
from serving.engines.native.passes import PassLimits
from serving.engines.native.runner import Sampled
from serving.engines.native.sampling import TokenizerInfo
from serving.engines.native.scheduler import Scheduler


class FakeRunner:
    """Gives `token_ids` after every complete piece, or raises `error`; waits for a permit."""

    def __init__(self) -> None:
        self.token_ids = [7]
        self.error: Exception | None = None
        self.num_passes = 0
        self.permits = threading.Semaphore(10_000)

    def run(self, pieces):
        self.permits.acquire()
        self.num_passes += 1
        if self.error is not None:
            raise self.error
        num_guessed = max(0, len(self.token_ids) - 1)
        return [Sampled(p, list(self.token_ids), num_guessed) for p in pieces if p.is_last]


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, token_ids):
        return "".join(chr(token_id) for token_id in token_ids)


@pytest.fixture
def runner():
    return FakeRunner()


@pytest.fixture
def start(runner):
    engines = []

    def start(vocabulary=VOCABULARY, **size):
        info = EngineInfo("native", 300, 64, 2, 1, 1, {}, {})
        limits = PassLimits(**{"max_slots": 2, "max_batch_tokens": 16, **size})
        scheduler = Scheduler(limits, BlockManager(64, 4))
        engines.append(NativeEngine(runner, scheduler, info, vocabulary, max_drafts=4))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(start):
    return start()


def chunks_of(engine, **options) -> list[Chunk]:
    async def run():
        request = GenerateRequest(**{"prompt_tokens": (5, 6), "max_tokens": 3, **options})
        return [chunk async for chunk in engine.generate(request)]

    return asyncio.run(run())


def ask(engine, **options) -> list[int]:
    return [token for chunk in chunks_of(engine, **options) for token in chunk.token_ids]


def test_generate_when_logits_are_not_finite_ends_that_sequence_only(engine, runner):
    runner.token_ids = []
    with pytest.raises(EngineError, match="not finite"):
        ask(engine)
    runner.token_ids = [7]
    assert ask(engine) == [7, 7, 7]
    assert (engine.stats().num_free_slots, engine.stats().tokens_in_flight) == (2, 0)


def test_generate_when_the_model_raises_ends_and_stays_ended_with_the_reason(engine, runner):
    runner.error = RuntimeError("out of memory")
    with pytest.raises(EngineError, match="RuntimeError: out of memory"):
        ask(engine)
    runner.error = None
    with pytest.raises(EngineError, match="out of memory"):
        ask(engine)
    with pytest.raises(EngineError, match="out of memory"):
        engine.stats()


def test_generate_when_guesses_hold_gives_several_tokens_a_pass(start, runner):
    engine = start(max_draft_rows=16)
    runner.token_ids = [7, 8]
    chunks = chunks_of(engine, max_tokens=5)
    assert [chunk.token_ids for chunk in chunks] == [(7, 8), (7, 8), (7,)]
    stats = engine.stats()
    assert (stats.generated_tokens, stats.drafted_tokens, stats.accepted_tokens) == (5, 3, 3)


def test_generate_when_an_end_token_is_among_guesses_drops_what_follows(start, runner):
    engine = start(Vocabulary(TokenizerInfo(300), stop_ids=frozenset({9})), max_draft_rows=16)
    runner.token_ids = [7, 9, 8]
    (chunk,) = chunks_of(engine, max_tokens=20)
    assert (chunk.token_ids, chunk.finish_reason) == ((7,), FinishReason.STOP)
    assert engine.stats().num_used_blocks == 0


def test_generate_when_a_stop_string_is_among_guesses_drops_what_follows(start, runner):
    engine = start(Vocabulary(TokenizerInfo(300), Letters()), max_draft_rows=16)
    runner.token_ids = [ord(letter) for letter in "abcd"]
    (chunk,) = chunks_of(engine, max_tokens=20, stop=("bc",))
    assert (chunk.text, chunk.token_ids) == ("a", tuple(b"abc"))


def test_generate_when_resumed_goes_on_with_what_is_left(engine, runner):
    chunks = chunks_of(engine, max_tokens=5, resumed_tokens=(7, 7, 7))
    assert [chunk.token_ids for chunk in chunks] == [(7,), (7,)]
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_generate_when_resumed_at_its_end_computes_nothing(start, runner):
    engine = start(Vocabulary(TokenizerInfo(300), Letters()))
    (full,) = chunks_of(engine, max_tokens=2, resumed_tokens=(97, 98))
    (stopped,) = chunks_of(engine, max_tokens=9, resumed_tokens=(97, 98), stop=("ab",))
    assert (full.finish_reason, full.token_ids) == (FinishReason.LENGTH, ())
    assert (stopped.finish_reason, stopped.text) == (FinishReason.STOP, "")
    assert runner.num_passes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resumed_tokens": (7, 7, 7, 7)}, "`resumed_tokens` has 4 tokens; at most 3"),
        ({"resumed_tokens": (300,)}, "token id 300"),
        ({"adapter": "french"}, "no adapter `french`; there are: none"),
        ({"stop": ("x",)}, "needs a tokenizer"),
        ({"grammar": {"kind": "json_object"}}, "needs a tokenizer"),
        ({"logit_bias": {1000: 1.0}}, "token id 1000"),
    ],
)
def test_generate_when_the_request_cannot_be_met_is_refused(engine, options, message):
    with pytest.raises(RequestError, match=message):
        chunks_of(engine, **options)
    assert ask(engine) == [7, 7, 7]


def test_generate_when_a_prompt_comes_again_says_what_was_cached_once(engine):
    prompt = tuple(range(10))
    first = chunks_of(engine, prompt_tokens=prompt)
    second = chunks_of(engine, prompt_tokens=prompt)
    other = chunks_of(engine, prompt_tokens=prompt, tenant="other")
    cached = [[chunk.cached_tokens for chunk in chunks] for chunks in (first, second, other)]
    assert cached == [[0, 0, 0], [8, 0, 0], [0, 0, 0]]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (10 + 2 + 10, 8)


def test_stats_when_a_reader_leaves_counts_nothing_of_it(engine, runner):
    runner.permits = threading.Semaphore(2)  # The prompt takes two passes.

    async def leave():
        request = GenerateRequest(prompt_tokens=(5,) * 20, ignore_eos=True)
        stream = engine.generate(request)
        await anext(stream)
        in_flight = engine.stats().tokens_in_flight
        await stream.aclose()
        runner.permits.release(100)
        return in_flight

    assert asyncio.run(leave()) == 64 - 20 - 1
    assert ask(engine) == [7, 7, 7]
    stats = engine.stats()
    assert (stats.tokens_in_flight, stats.num_used_blocks, stats.num_running) == (0, 0, 0)
