"""A cache in int8, from a recipe to a directory and an engine; what is not ours is refused."""

import asyncio
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from tiny_models import decoder_config, publish
from transformers import AutoModelForCausalLM

from cluster.errors import ModelFormatError, RecipeError
from jobs.compression.encoders import load_encoder, save_encoder
from jobs.compression.packing import LoadedModel, load_model, save_compressed
from jobs.compression.recipe import apply_recipe, predicted_bytes
from jobs.config import DecoderConfig, KvCache, Recipe, Step
from jobs.evaluation.cached import CachedReading
from jobs.evaluation.latency import compare_latency
from jobs.evaluation.quality import greedy_reference
from jobs.kernels.block_cache import BlockCache
from jobs.models import encoder
from jobs.models.decoder import build
from serving.engines import _published
from serving.engines._protocol import EngineInfo, EngineStats, GenerateRequest
from serving.engines.native import EngineConfig, create, start

INT4 = Step(method="rtn", options={"scheme": "w4a16", "group_size": 32})
INT8_CACHE = Recipe(kv_cache="int8")
SHAPE = decoder_config(vocab_size=300, initializer_range=0.3, max_seq_len=64)
SCHEME = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 16,
    "dynamic": True,
}
CREATE_OPTIONS = {"max_slots": 4, "max_batch_tokens": 16, "device": "cpu"}


def write(folder: Path, recipe: Recipe, config: DecoderConfig = SHAPE) -> Path:
    compressed = apply_recipe(build(config, seed=3).to(torch.bfloat16).float(), recipe)
    return publish(folder, partial(save_compressed, compressed))


def document_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def set_scheme(folder: Path, scheme: object) -> None:
    document = document_of(folder)
    document["quantization_config"]["kv_cache_scheme"] = scheme  # type: ignore[index]  # JSON
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("steps", [(), (INT4,)])
def test_directory_when_written_says_int8_as_compressed_tensors_reads_it(
    tmp_path: Path, steps: tuple[Step, ...]
) -> None:
    write(tmp_path, Recipe(steps=steps, kv_cache="int8"))
    theirs = QuantizationConfig.model_validate(document_of(tmp_path)["quantization_config"])
    assert theirs.kv_cache_scheme is not None
    assert (theirs.kv_cache_scheme.strategy, theirs.kv_cache_scheme.group_size) == ("group", 16)
    loaded = load_model(tmp_path)
    assert loaded.kv_cache == _published.kv_cache(tmp_path) == "int8"
    assert set(loaded.schemes.values()) == ({"bf16", "w4a16"} if steps else {"bf16"})
    # And as they write it back.
    set_scheme(tmp_path, theirs.model_dump(mode="json")["kv_cache_scheme"])
    assert load_model(tmp_path, verify=False).kv_cache == "int8"


def test_directory_when_the_cache_is_auto_says_nothing(tmp_path: Path) -> None:
    write(tmp_path / "dense", Recipe())
    write(tmp_path / "int4", Recipe(steps=(INT4,)))
    assert "quantization_config" not in document_of(tmp_path / "dense")
    for name in ("dense", "int4"):
        assert (
            load_model(tmp_path / name).kv_cache == _published.kv_cache(tmp_path / name) == "auto"
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@torch.no_grad()
def test_directory_when_loaded_by_transformers_rounds_as_we_do(tmp_path: Path, shape: str) -> None:
    config = SHAPE.replace(shape=shape)
    write(tmp_path, INT8_CACHE, config)
    tokens = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    model = load_model(tmp_path).model
    exact = model(tokens)
    ours = model.head(CachedReading(model, "int8", 1, 60).hidden(tokens))
    # Their scale is largest / 127.5 and ours / 127: two roundings of the same size.
    error, their_error = ((x - exact).square().mean().sqrt() for x in (ours, theirs))
    assert error > 0
    assert 0.7 < float(their_error / error) < 1.4


@pytest.mark.parametrize(
    "change",
    [
        {"type": "float"},
        {"num_bits": 4},
        {"symmetric": False},
        {"strategy": "token", "group_size": None},
        {"strategy": "attn_head", "group_size": None, "dynamic": False},
        {"group_size": 8},
        {"dynamic": False},
        {"scale_dtype": "torch.bfloat16"},
    ],
)
def test_directory_when_the_scheme_is_another_is_refused_by_name(
    tmp_path: Path, change: dict[str, object]
) -> None:
    write(tmp_path, INT8_CACHE)
    set_scheme(tmp_path, {**SCHEME, **change})
    option, value = next(iter(change.items()))
    for read in (partial(load_model, verify=False), _published.kv_cache):
        with pytest.raises(ModelFormatError, match=rf"kv_cache_scheme: .*'{option}': '?{value}"):
            read(tmp_path)


def answers(
    loaded: LoadedModel | Path, prompts: list[tuple[int, ...]], **options: object
) -> tuple[list[list[int]], EngineInfo, EngineStats]:
    """Return what an engine answers and says of itself."""
    every = {**CREATE_OPTIONS, **options}
    if isinstance(loaded, Path):
        engine = create(loaded, every)
    else:
        engine = start(loaded, EngineConfig.model_validate(every))

    async def ask(prompt: tuple[int, ...]) -> list[int]:
        request = GenerateRequest(
            prompt_tokens=prompt, max_tokens=12, temperature=0.0, ignore_eos=True
        )
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*map(ask, prompts))

    found = asyncio.run(ask_all())
    stats, info = engine.stats(), engine.info()
    engine.close()
    return found, info, stats


PROMPTS = [tuple((7 * n + i) % 290 + 5 for i in range(3 + 6 * n)) for n in range(7)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_slots": 1},
        {"max_batch_tokens": 4, "block_size": 4},
        {"speculation": {"kind": "ngram"}},
        {"enable_prefix_cache": False},
    ],
)
def test_engine_when_the_directory_says_int8_answers_as_the_reference(
    tmp_path: Path, options: dict[str, object]
) -> None:
    write(tmp_path, Recipe(steps=(INT4,), kv_cache="int8"))
    loaded = load_model(tmp_path)
    expected = [
        greedy_reference(loaded.model, prompt, 12, kv_cache=loaded.kv_cache) for prompt in PROMPTS
    ]
    found, info, stats = answers(tmp_path, PROMPTS, **options)
    assert found == expected
    block_size = EngineConfig.model_validate(options).block_size
    block_bytes = BlockCache.bytes_per_block(loaded.config, block_size, torch.int8)
    assert info.cache_bytes == stats.num_blocks * block_bytes


def test_engine_when_options_name_a_type_keeps_that(tmp_path: Path) -> None:
    write(tmp_path, INT8_CACHE)
    found, info, stats = answers(tmp_path, PROMPTS, cache_dtype="float32")
    model = load_model(tmp_path).model
    assert found == [greedy_reference(model, prompt, 12) for prompt in PROMPTS]
    float_bytes = BlockCache.bytes_per_block(SHAPE, 16, torch.float32)
    assert info.cache_bytes == stats.num_blocks * float_bytes


def test_engine_when_memory_is_given_has_more_blocks_in_int8() -> None:
    # A head of 64 values takes 4 x 64 bytes a token in float32, and 64 and a scale in int8.
    config = SHAPE.replace(head_dim=64)
    allowed_bytes = 64 * BlockCache.bytes_per_block(config, 16, torch.float32)
    num_blocks = {}
    kinds: tuple[KvCache, ...] = ("auto", "int8")
    for kind in kinds:
        loaded = LoadedModel(build(config, seed=0), config, {}, {}, 0, kind)
        _, info, stats = answers(loaded, [(5, 6)], cache_bytes=allowed_bytes)
        num_blocks[kind] = stats.num_blocks
        assert info.cache_bytes <= allowed_bytes
    assert num_blocks == {"auto": 64, "int8": 64 * 256 // 68}


def test_compare_latency_when_one_cache_is_int8_holds_fewer_bytes() -> None:
    model = build(SHAPE, seed=0)
    dense, small = compare_latency(
        [model, model], context=16, tokens=2, repeats=1, kv_caches=["auto", "int8"]
    )
    assert dense.cache_bytes * (16 + 4) == small.cache_bytes * 4 * 16


def test_recipe_when_only_the_cache_is_int8_keeps_the_weights() -> None:
    assert predicted_bytes(SHAPE, INT8_CACHE) == predicted_bytes(SHAPE, Recipe())


def test_recipe_when_an_encoder_shall_cache_is_refused(tmp_path: Path) -> None:
    shape = encoder.EncoderConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2
    )
    with pytest.raises(RecipeError, match=r"`kv_cache` = int8: an encoder keeps no"):
        apply_recipe(encoder.build(shape, seed=0), INT8_CACHE)
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))
    save_encoder(apply_recipe(encoder.build(shape, seed=0), recipe), tmp_path)
    set_scheme(tmp_path, SCHEME)
    with pytest.raises(ModelFormatError, match=r"kv_cache_scheme: .*an encoder keeps none"):
        load_encoder(tmp_path, verify=False)
