"""What the gate looks at beside losses: broken parts of a model, and equal choices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, KvCache, Recipe, Step
from jobs.evaluation.agreement import continue_greedily, greedy_agreement
from jobs.evaluation.health import output_faults, weight_faults
from jobs.evaluation.intervals import bootstrapped_mean, median_ratio
from jobs.evaluation.quality import greedy_reference
from jobs.kernels.formats import GROUPED
from jobs.kernels.memory import StoredEmbedding
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=64,
    tie_embeddings=False,
)
TEXT = np.random.default_rng(0).integers(0, 64, size=(4, 12))
DOWN = "model.layers.1.mlp.down_proj"


def _spoilt(layer: str, value: float, *, whole: bool) -> Decoder:
    model = build(CONFIG, seed=0)
    with torch.no_grad():
        weight = model.get_submodule(layer).weight
        (weight if whole else weight[0, :1]).fill_(value)
    return model


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "w8a16", "w4a16", "w3a16", "fp8"])
def test_weight_faults_when_a_layer_is_zero_names_it_in_every_format(
    scheme: str, tmp_path: Path
) -> None:
    groups = {"group_size": 64} if scheme in GROUPED else {}
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": scheme, **groups}),))
    for folder, model in (("good", build(CONFIG, seed=0)), ("bad", _spoilt(DOWN, 0, whole=True))):
        (tmp_path / folder).mkdir()
        save_compressed(apply_recipe(model, recipe), tmp_path / folder)
    assert weight_faults(tmp_path / "good") == []
    (found,) = weight_faults(tmp_path / "bad")
    assert found.startswith(f"`{DOWN}.weight")
    assert found.endswith("all zeros")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_faults_when_a_value_is_not_finite_names_the_layer(
    value: float, tmp_path: Path
) -> None:
    save_compressed(apply_recipe(_spoilt(DOWN, value, whole=False), Recipe()), tmp_path)
    assert weight_faults(tmp_path) == [f"`{DOWN}.weight` holds values that are not finite numbers"]


def test_output_faults_when_a_model_is_sound_finds_none(tmp_path: Path) -> None:
    model = build(CONFIG, seed=0)
    assert output_faults(model, TEXT) == []
    save_compressed(apply_recipe(model, Recipe()), tmp_path)
    assert output_faults(load_model(tmp_path, verify=False).model, TEXT) == []


@pytest.mark.parametrize(
    ("layer", "value", "text"),
    [
        (DOWN, 0.0, f"`{DOWN}` gives nothing but zeros"),
        (
            "model.layers.0.self_attn.v_proj",
            float("nan"),
            "`model.layers.0.self_attn.v_proj` gives",
        ),
        ("lm_head", 0.0, "equal for all tokens"),
        ("model.embed_tokens", 1.0, "do not depend on the text"),
    ],
)
def test_output_faults_when_a_layer_is_spoilt_names_what_it_does(
    layer: str, value: float, text: str
) -> None:
    assert any(text in fault for fault in output_faults(_spoilt(layer, value, whole=True), TEXT))


def test_continue_greedily_when_batched_equals_the_plain_reference() -> None:
    model = build(CONFIG, seed=0)
    found_KT = continue_greedily(model, torch.from_numpy(TEXT), 6)
    for prompt, found in zip(TEXT.tolist(), found_KT.tolist(), strict=True):
        assert found == greedy_reference(model, prompt, 6)


def test_greedy_agreement_when_models_are_equal_or_not_says_so() -> None:
    base = build(CONFIG, seed=0)
    assert (greedy_agreement(base, build(CONFIG, seed=0), TEXT, 6) == 1.0).all()
    assert greedy_agreement(base, build(CONFIG, seed=1), TEXT, 6).mean() < 0.5


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_continue_greedily_when_the_cache_is_given_equals_the_reference_that_rounds_so(
    kv_cache: KvCache,
) -> None:
    model = build(CONFIG.replace(initializer_range=0.5), seed=0)
    found_KT = continue_greedily(model, torch.from_numpy(TEXT), 16, kv_cache)
    for prompt, found in zip(TEXT.tolist(), found_KT.tolist(), strict=True):
        assert found == greedy_reference(model, prompt, 16, kv_cache=kv_cache)


def test_greedy_agreement_when_one_cache_rounds_tells_its_choices_apart() -> None:
    model = build(CONFIG.replace(initializer_range=0.5), seed=0)
    text = np.random.default_rng(1).integers(0, 64, size=(32, 12))
    small: tuple[KvCache, KvCache] = ("int8", "int8")
    assert (greedy_agreement(model, model, text, 32, small) == 1.0).all()
    assert greedy_agreement(model, model, text, 32, ("auto", "int8")).mean() < 1.0


def test_continue_greedily_when_the_embedding_is_stored_narrow_caches_in_the_norms_type() -> None:
    model = build(CONFIG.replace(initializer_range=0.5), seed=0)
    weight = model.model.embed_tokens.weight.detach().bfloat16()
    model.model.embed_tokens = StoredEmbedding(weight, torch.float32)
    text = np.random.default_rng(2).integers(0, 64, size=(32, 12))
    found_KT = continue_greedily(model, torch.from_numpy(text), 32)
    for prompt, found in zip(text.tolist(), found_KT.tolist(), strict=True):
        assert found == greedy_reference(model, prompt, 32)


@pytest.mark.parametrize("first", [0, 1])
def test_faults_when_the_base_has_the_same_zeros_are_none(tmp_path: Path, first: int) -> None:
    recipe = Recipe(
        steps=(
            *([Step(method="depth", options={"num_blocks": 1, "first": 0})] if first else []),
            Step(method="rtn", options={"scheme": "w4a16", "group_size": 64}),
        )
    )
    models = (_spoilt(DOWN, 0, whole=True), Recipe()), (_spoilt(DOWN, 0, whole=True), recipe)
    for folder, (model, steps) in zip(("base", "small"), models, strict=True):
        (tmp_path / folder).mkdir()
        text = CalibrationText.of(torch.from_numpy(TEXT))
        save_compressed(apply_recipe(model, steps, text), tmp_path / folder)
    base, small = (load_model(tmp_path / f, verify=False).model for f in ("base", "small"))
    assert any("all zeros" in each for each in weight_faults(tmp_path / "small"))
    assert weight_faults(tmp_path / "small", tmp_path / "base") == []
    assert any("nothing but zeros" in each for each in output_faults(small, TEXT))
    assert output_faults(small, TEXT, base) == []
    sound = build(CONFIG, seed=0)
    assert output_faults(small, TEXT, sound) == output_faults(small, TEXT)


def test_median_ratio_when_one_round_is_interrupted_is_not_moved() -> None:
    base = np.linspace(1.0, 1.1, 24)
    slow = base * 1.1
    slow[3] *= 50
    found = median_ratio(base, slow)
    assert found.point == pytest.approx(1.1)
    assert found.lower == pytest.approx(1.1)
    assert median_ratio(base[:4], slow[:4]).lower == 0.0


def test_median_ratio_when_models_are_equal_rarely_calls_one_slower() -> None:
    generator = np.random.default_rng(0)
    lows = [
        median_ratio(*np.exp(generator.standard_t(2, size=(2, 24)) * 0.1)).lower
        for _ in range(2000)
    ]
    assert np.mean(np.array(lows) > 1) < 0.05


def test_bootstrapped_mean_when_values_are_equal_is_exact() -> None:
    found = bootstrapped_mean(np.ones(16), samples=100, seed=0)
    assert (found.lower, found.point, found.upper) == (1.0, 1.0, 1.0)
