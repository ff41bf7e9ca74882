from itertools import count
from pathlib import Path

import pytest

from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, Recipe, Step
from jobs.evaluation.latency import compare_latency, decode_latency
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=32,
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build(CONFIG, seed=0)


def _steady_clock():
    ticks = count()
    return lambda: next(ticks) * 0.002  # 2 ms between any two readings


def test_decode_latency_when_every_step_takes_two_ms_says_so(model: Decoder) -> None:
    found = decode_latency(model, batch=3, context=8, tokens=4, repeats=2, clock=_steady_clock())
    assert found.p50_ms == pytest.approx(2.0)
    assert found.p10_ms == pytest.approx(found.p90_ms)
    assert found.tokens_per_s == pytest.approx(1500.0)
    assert found.steps == 8


def test_decode_latency_when_measured_counts_weights_and_cache(model: Decoder) -> None:
    found = decode_latency(model, batch=2, context=8, tokens=4, repeats=1)
    parameters = {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert sum(parameters.values()) <= found.weight_bytes <= sum(parameters.values()) + 1024
    # 2 layers, keys and values, 2 sequences, a block of 16 tokens, 1 head of 16 float32
    assert found.cache_bytes == 2 * 2 * 2 * 16 * 16 * 4
    assert found.p50_ms > 0


def test_decode_latency_when_weights_are_packed_counts_them(model: Decoder, tmp_path: Path) -> None:
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))
    save_compressed(apply_recipe(build(CONFIG, seed=0), recipe), tmp_path)
    loaded = load_model(tmp_path, verify=False)
    found = decode_latency(loaded.model, context=8, tokens=4, repeats=1)
    assert found.weight_bytes == loaded.weight_bytes


def test_compare_latency_when_given_two_models_measures_both(model: Decoder) -> None:
    wide = build(CONFIG.replace(intermediate_size=128), seed=0)
    first, second = compare_latency([model, wide], context=8, tokens=4, repeats=1)
    assert second.weight_bytes > first.weight_bytes
    assert first.steps == second.steps == 4


def test_decode_latency_when_the_context_is_too_long_is_a_bug(model: Decoder) -> None:
    with pytest.raises(AssertionError, match="max_seq_len=32"):
        decode_latency(model, context=30, tokens=4)
