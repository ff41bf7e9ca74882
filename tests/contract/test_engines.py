"""What every engine plug-in must do, over a tiny published model; one line per behaviour.

What a request can ask for is in test_engine_requests.py.
"""

import asyncio
from functools import partial

import pytest
import torch
from engine_plugins import (
    IS_VLLM_INSTALLED,
    NAMES,
    PROMPTS,
    SHAPE,
    Plugin,
    answer,
    chunks_of,
    tokens_of,
)
from tiny_models import publish

from cluster.errors import ConfigError, EngineError, IntegrityError, PlacementError, RequestError
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe, Step
from jobs.evaluation.quality import greedy_reference
from jobs.kernels.build import cpu_flags
from jobs.models.decoder import build, save
from serving.engines._protocol import GenerateRequest
from serving.engines.vllm.cpu import why_not


def test_engines_when_listed_are_the_ones_tested_here():
    assert NAMES == ["native", "transformers", "vllm"]


@pytest.mark.skipif(IS_VLLM_INSTALLED, reason="vLLM is installed")
def test_create_when_vllm_is_not_installed_says_what_to_do(directory):
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[vllm\]'"):
        Plugin("vllm").create(directory)


def test_generate_when_greedy_equals_the_plain_forward_for_every_batch(engine, reference):
    async def ask_all():
        return await asyncio.gather(*(chunks_of(engine, p, max_tokens=20) for p in PROMPTS))

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    assert answers == [greedy_reference(reference, p, 20, {1}) for p in PROMPTS]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # zentorch's first import
@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w4a16"])
def test_generate_when_model_is_quantized_follows_the_plain_forward(plugin, tmp_path, scheme):
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": scheme}),))
    publish(tmp_path, partial(save_compressed, apply_recipe(build(SHAPE, seed=4), recipe)))
    plain = load_model(tmp_path).model
    options = {"max_slots": 4, "max_batch_tokens": 16, **_typed(plugin, scheme)}
    if plugin.name == "vllm" and (reason := why_not({scheme}, cpu_flags())):
        with pytest.raises(ConfigError, match=reason):
            plugin.create(tmp_path, **options)
        return
    engine = plugin.create(tmp_path, **options)

    async def ask_all():
        return await asyncio.gather(*(chunks_of(engine, p, max_tokens=12) for p in PROMPTS))

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    engine.close()
    assert scheme in engine.info().schemes.values()
    if plugin.name == "native":
        assert answers == [greedy_reference(plain, p, 12, {1}) for p in PROMPTS]
    # Others round activations a little differently (a scale of largest / 127.5), so that what is
    # nearly as likely may be chosen; a token at random is 3 deviations from the best.
    assert max(regret(plain, *pair) for pair in zip(PROMPTS, answers, strict=True)) < 0.6


def test_generate_when_the_directory_caches_in_int8_follows_the_plain_forward(plugin, tmp_path):
    compressed = apply_recipe(build(SHAPE, seed=4), Recipe(kv_cache="int8"))
    publish(tmp_path, partial(save_compressed, compressed))
    if plugin.name == "vllm":
        with pytest.raises(ConfigError, match="reads no int8 `kv_cache_scheme`"):
            plugin.create(tmp_path)
        return
    engine = plugin.create(tmp_path, max_slots=4, max_batch_tokens=16)

    async def ask_all():
        return await asyncio.gather(*(chunks_of(engine, p, max_tokens=12) for p in PROMPTS))

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    engine.close()
    plain = load_model(tmp_path).model
    if plugin.name == "native":
        assert answers == [greedy_reference(plain, p, 12, {1}, kv_cache="int8") for p in PROMPTS]
    assert max(regret(plain, *pair) for pair in zip(PROMPTS, answers, strict=True)) < 0.6


def _typed(plugin, scheme):
    # vLLM's 4-bit product takes bfloat16 alone.
    return {"dtype": "bfloat16"} if (plugin.name, scheme) == ("vllm", "w4a16") else {}


def test_generate_when_an_adapter_is_named_runs_with_it_beside_others(
    engine, reference, adapted_reference
):
    async def ask_all():
        return await asyncio.gather(
            *(chunks_of(engine, p, adapter=name) for p in PROMPTS for name in (None, "loud"))
        )

    answers = [tokens_of(chunks) for chunks in asyncio.run(ask_all())]
    assert answers[::2] == [greedy_reference(reference, p, 8, {1}) for p in PROMPTS]
    assert answers[1::2] == [greedy_reference(adapted_reference, p, 8, {1}) for p in PROMPTS]
    assert answers[::2] != answers[1::2]


def test_generate_when_the_adapter_is_unknown_is_refused(engine):
    with pytest.raises(RequestError, match="no adapter `quiet`; there are: loud"):
        answer(engine, adapter="quiet")


def test_generate_when_closed_early_frees_its_slot(engine):
    async def leave_early():
        stream = engine.generate(
            GenerateRequest(prompt_tokens=(5,), temperature=0.0, ignore_eos=True)
        )
        await anext(stream)
        await stream.aclose()
        # The next request runs after the cancellation, in the same order as they were asked.
        return await chunks_of(engine)

    asyncio.run(leave_early())
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_slots) == (0, 0, 4)
    assert stats.generated_tokens > 0


def test_info_when_asked_describes_the_model(engine):
    info = engine.info()
    assert (info.vocab_size, info.max_len, info.max_slots) == (300, 64, 4)
    assert info.weight_bytes > 0
    assert info.cache_bytes > 0


def test_create_when_option_is_unknown_is_refused(plugin, directory):
    with pytest.raises(ConfigError, match="max_slots"):
        plugin.create(directory, max_slot=3)


def test_create_when_cache_exceeds_memory_is_refused(plugin, tmp_path):
    publish(tmp_path, partial(save, build(SHAPE.replace(max_seq_len=2**30), seed=0)))
    with pytest.raises(PlacementError, match="max_len=1073741824"):
        plugin.create(tmp_path, max_slots=1024, max_len=2**30)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_create_when_a_file_is_damaged_is_refused(plugin, directory, tmp_path, name):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        plugin.create(tmp_path)


def test_close_when_sequences_run_ends_them_and_refuses_new_ones(plugin, directory):
    engine = plugin.create(directory, max_slots=1)

    async def close_while_running():
        running = engine.generate(
            GenerateRequest(prompt_tokens=(5,), temperature=0.0, ignore_eos=True)
        )
        await anext(running)
        # One slot and many whole contexts: they cannot all be done before the engine is closed.
        waiting = [
            asyncio.create_task(chunks_of(engine, max_tokens=None, ignore_eos=True))
            for _ in range(100)
        ]
        await asyncio.sleep(0)
        engine.close()
        outcomes = await asyncio.gather(drain(running), *waiting, return_exceptions=True)
        return [outcome for outcome in outcomes if isinstance(outcome, EngineError)]

    async def drain(stream):
        return [chunk async for chunk in stream]

    failures = asyncio.run(close_while_running())
    assert len(failures) >= 1
    with pytest.raises(EngineError):
        engine.stats()
    with pytest.raises(EngineError):
        answer(engine)
    engine.close()


def regret(model, prompt_tokens, answer_tokens) -> float:
    """Return how far, in deviations of the logits, an answer's worst token is from the best."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt_tokens, *answer_tokens]]))[0]
    logits_TV = logits_TV[len(prompt_tokens) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(answer_tokens)[:, None])[:, 0]
    return float(((logits_TV.amax(dim=1) - chosen_T) / logits_TV.std(dim=1)).max())
