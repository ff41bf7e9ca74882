"""What the vLLM engine says in vLLM's own words; it runs where vLLM is installed."""

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest
from tiny_models import publish

from cluster.errors import ConfigError, EngineError, RequestError
from jobs.compression.packing import save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, Step
from jobs.models.decoder import build
from serving.engines._protocol import (
    Chunk,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
)
from serving.engines.native.answers import Vocabulary
from serving.engines.native.sampling import TokenizerInfo
from serving.engines.vllm import create

pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm` runs this")

from serving.engines.vllm.engine import VllmEngine
from serving.engines.vllm.params import sampling_params


class FakeLlm:
    """Gives one token after another; an exception among them is raised."""

    errored = False

    def __init__(self, *items) -> None:
        self._items = items

    async def generate(self, prompt, params, request_id, lora_request):
        for item in self._items:
            if isinstance(item, BaseException):
                raise item
            output = SimpleNamespace(token_ids=[item], logprobs=None)
            yield SimpleNamespace(num_cached_tokens=0, outputs=[output])

    def shutdown(self) -> None:
        """Nothing runs."""


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, token_ids):
        return "".join(chr(token_id) for token_id in token_ids)


class BusyLlm(FakeLlm):
    """Takes requests and gives nothing."""

    async def generate(self, prompt, params, request_id, lora_request):
        await asyncio.Event().wait()
        yield


def engine_over(llm: FakeLlm) -> VllmEngine:
    """Return an engine of two slots over a stand-in for vLLM."""

    async def start(arguments):
        return llm

    info = EngineInfo("vllm", 300, 64, 2, 1, 1, {}, {})
    return VllmEngine(None, info, Vocabulary(TokenizerInfo(300), Letters()), {}, start)


async def ask(engine: VllmEngine, **options) -> list[Chunk]:
    request = GenerateRequest(prompt_tokens=(5, 6), max_tokens=8, **options)
    return [chunk async for chunk in engine.generate(request)]


def chunks_of(llm: FakeLlm, **options) -> list[Chunk]:
    """Ask an engine once; nothing may take long."""
    engine = engine_over(llm)
    try:
        chunks = asyncio.run(asyncio.wait_for(ask(engine, **options), 10))
        assert engine.stats().num_running == 0
        return chunks
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ((97, ValueError("odd")), "vLLM failed: ValueError: odd"),
        ((97, asyncio.CancelledError()), "was cancelled"),
        ((97,), "without saying why"),
        ((), "without saying why"),
    ],
)
def test_generate_when_vllm_ends_in_an_odd_way_ends_the_reader(items, words):
    with pytest.raises(EngineError, match=words):
        chunks_of(FakeLlm(*items))


def test_generate_when_resumed_within_a_stop_string_knows_its_beginning():
    (chunk,) = chunks_of(FakeLlm(99, 100), resumed_tokens=(97, 98), stop=("bc",))
    assert chunk == Chunk("", (99,), FinishReason.STOP)


@pytest.mark.parametrize(("num_requests", "does_wait"), [(2, False), (3, True)])
def test_stats_when_more_ask_than_there_are_slots_say_how_long_one_waits(num_requests, does_wait):
    async def load_of(engine: VllmEngine):
        asked = [asyncio.create_task(ask(engine)) for _ in range(num_requests)]
        while len(engine._running) < num_requests:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.005)
        stats = engine.stats()
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        return stats

    engine = engine_over(BusyLlm())
    try:
        stats = asyncio.run(asyncio.wait_for(load_of(engine), 10))
    finally:
        engine.close()
    assert (stats.num_running, stats.num_waiting) == (2, num_requests - 2)
    assert (stats.queue_age_s > 0) == does_wait


def params(**options):
    request = GenerateRequest(prompt_tokens=(5, 6), **options)
    return sampling_params(request, max_tokens=20, stop_ids={3, 1}, vocab_size=300)


def test_params_when_request_is_plain_leave_text_to_us():
    found = params()
    assert (found.max_tokens, found.top_k, found.stop_token_ids) == (20, 0, [1, 3])
    assert (found.detokenize, found.stop, found.seed) == (False, [], None)


def test_params_when_everything_is_asked_for_carry_it():
    found = params(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={7: 2.0},
        num_logprobs=3,
    )
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 7, 0.1)
    assert (found.presence_penalty, found.frequency_penalty) == (0.2, 0.3)
    assert (found.repetition_penalty, found.logit_bias) == (1.1, {7: 2.0})
    assert found.logprobs == 3


def test_params_when_end_tokens_are_ignored_stop_at_none():
    found = params(ignore_eos=True)
    assert (found.ignore_eos, found.stop_token_ids) == (True, [])


def test_params_when_resumed_ask_for_the_rest_with_other_draws():
    whole, rest = params(seed=5), params(seed=5, resumed_tokens=(7, 8, 9))
    assert rest.max_tokens == 17
    assert None not in (whole.seed, rest.seed)
    assert whole.seed != rest.seed
    assert whole.seed != params(seed=-5).seed


@pytest.mark.parametrize(
    "options",
    [{"presence_penalty": 1.0}, {"grammar": Grammar(kind=GrammarKind.JSON_OBJECT)}],
)
def test_params_when_resumed_with_what_needs_the_past_are_refused(options):
    with pytest.raises(RequestError, match="cannot go on with"):
        params(resumed_tokens=(7,), **options)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("w4a16", "bfloat16"),
        ("w3a16", r"no kernel for w3a16 .*`model\.layers\.0.*w4a16"),
        ("w8a16", r"no kernel for w8a16 .*`model\.layers\.0.*engine `native`, .*w4a16"),
    ],
)
def test_create_when_vllm_has_no_kernel_is_refused(tmp_path, scheme, words):
    shape = DecoderConfig(vocab_size=300, hidden_size=128, intermediate_size=256, num_layers=1)
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": scheme}),))
    publish(tmp_path, partial(save_compressed, apply_recipe(build(shape, seed=4), recipe)))
    with pytest.raises(ConfigError, match=words):
        create(tmp_path, {"dtype": "float32"})
