"""What the native engine is put together from: memory, adapters, caches, what it says of itself."""

import asyncio
import json
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import publish

from cluster.errors import ModelFormatError, PlacementError
from jobs.config import DecoderConfig
from jobs.evaluation.quality import greedy_reference
from jobs.kernels import native
from jobs.kernels.block_cache import BlockCache
from jobs.models.decoder import build, save
from serving.engines._protocol import GenerateRequest
from serving.engines.native import create, start
from serving.engines.native.config import EngineConfig
from serving.engines.native.memory import count_blocks

SHAPE = DecoderConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_range=0.3,
)
CPU = torch.device("cpu")
LAYER = "model.layers.0.mlp.down_proj"


def options(**changes) -> EngineConfig:
    return EngineConfig(**{"max_slots": 4, "max_batch_tokens": 16, "device": "cpu", **changes})


def answers(engine, prompts, **asked) -> list[list[int]]:
    async def ask(prompt, adapter):
        request = GenerateRequest(
            prompt_tokens=prompt, max_tokens=12, temperature=0.0, adapter=adapter, **asked
        )
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    async def ask_all():
        return await asyncio.gather(*(ask(*prompt) for prompt in prompts))

    return asyncio.run(ask_all())


def write_adapter(directory, down_AI, up_OA) -> str:
    directory.mkdir()
    config = {"peft_type": "LORA", "r": len(down_AI), "lora_alpha": 2 * len(down_AI)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    names = {"A": down_AI, "B": up_OA}
    tensors = {f"base_model.model.{LAYER}.lora_{side}.weight": t for side, t in names.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return str(directory)


def test_start_when_adapters_are_given_runs_each_row_with_its_own(tmp_path):
    generator = torch.Generator().manual_seed(5)
    down_AI = torch.randn(4, 64, generator=generator) * 0.3
    up_OA = torch.randn(32, 4, generator=generator) * 0.3
    plain, merged = build(SHAPE, seed=3), build(SHAPE, seed=3)
    with torch.no_grad():
        merged.get_submodule(LAYER).weight += 2 * up_OA @ down_AI
    adapters = {"mine": write_adapter(tmp_path / "mine", down_AI, up_OA)}
    engine = start(plain, options(adapters=adapters))
    prompts = [tuple(range(5, 25)), (7, 8), tuple(range(5, 25)), (7, 8)]
    asked = list(zip(prompts, [None, "mine", "mine", None], strict=True))
    found = answers(engine, asked)
    again = answers(engine, asked)  # With cached prefixes, which adapters must not share.
    engine.close()
    models = [plain, merged, merged, plain]
    expected = [greedy_reference(m, p, 12) for m, p in zip(models, prompts, strict=True)]
    assert (found, again) == (expected, expected)
    assert engine.info().adapters == ("mine",)


def test_start_when_an_adapter_is_missing_is_refused(tmp_path):
    with pytest.raises(ModelFormatError, match="cannot be read"):
        start(build(SHAPE, seed=3), options(adapters={"mine": str(tmp_path)}))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_start_when_the_cache_is_small_types_answers_alike_however_it_is_filled(dtype):
    prompts = [(tuple(range(place, place + 30)), None) for place in range(5, 11)]
    found = []
    for changes in ({}, {"max_batch_tokens": 4}, {"block_size": 4, "enable_prefix_cache": False}):
        engine = start(build(SHAPE, seed=3), options(cache_dtype=dtype, **changes))
        found.append(answers(engine, prompts))
        engine.close()
    assert found[0] == found[1] == found[2]


def test_start_when_cache_bytes_are_few_preempts_and_answers_alike():
    model = build(SHAPE, seed=3)
    block_bytes = BlockCache.bytes_per_block(SHAPE, 4, torch.float32)
    prompts = [(tuple(range(place, place + 20)), None) for place in range(5, 11)]
    engine = start(model, options(block_size=4, cache_bytes=20 * block_bytes))
    found = answers(engine, prompts)
    stats = engine.stats()
    engine.close()
    assert found == [greedy_reference(model, prompt, 12) for prompt, _ in prompts]
    assert stats.num_blocks == 20
    assert stats.num_preemptions > 0
    assert engine.info().cache_bytes == 20 * block_bytes


def test_count_blocks_when_one_sequence_does_not_fit_is_refused():
    with pytest.raises(PlacementError, match=r"max_len=64 .* `cache_bytes` allows"):
        count_blocks(options(cache_bytes=1000), [SHAPE], 64, CPU, torch.float32)


def test_count_blocks_when_memory_is_free_holds_every_slot():
    assert count_blocks(options(block_size=16), [SHAPE], 60, CPU, torch.float32) == 4 * 4


def test_count_blocks_when_a_draft_has_a_cache_too_counts_both():
    block_bytes = BlockCache.bytes_per_block(SHAPE, 16, torch.float32)
    config = options(cache_bytes=20 * block_bytes)
    assert count_blocks(config, [SHAPE], 60, CPU, torch.float32) == 20
    assert count_blocks(config, [SHAPE, SHAPE], 60, CPU, torch.float32) == 10


def test_create_when_loaded_says_what_runs_on_which_operator(tmp_path, caplog):
    publish(tmp_path, partial(save, build(SHAPE, seed=3)))
    with caplog.at_level(logging.INFO, logger="serving.engines.native"):
        create(tmp_path, {"max_len": 32}).close()
    (record,) = (r for r in caplog.records if r.name.endswith("native.loading"))
    operator = "cpp" if native.is_available() else "dense"
    assert f"15 x bf16 on {operator}" in record.getMessage()
    assert "decoding: operator by operator" in record.getMessage()
    assert f"kernels: {native.instruction_set() or 'none'}" in record.getMessage()
