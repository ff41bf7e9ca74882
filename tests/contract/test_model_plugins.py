"""What every model family in jobs/models must offer, and what those that generate must."""

import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch

import jobs.models
from cluster.errors import ConfigError, ModelFormatError
from jobs.config import DecoderConfig
from jobs.models.encoder import EncoderConfig
from jobs.plugins import load_plugin, plugin_names

NAMES = plugin_names(jobs.models)
ENCODER = EncoderConfig(
    vocab_size=53, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4
)
SHAPES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(params=NAMES)
def any_family(request: pytest.FixtureRequest) -> ModuleType:
    return load_plugin(jobs.models, request.param, what="model family")


@pytest.fixture
def family() -> ModuleType:
    """The family that generates."""
    return load_plugin(jobs.models, "decoder", what="model family")


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return DecoderConfig(
        shape=request.param,
        vocab_size=53,
        hidden_size=32,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
    )


def test_families_when_listed_are_the_ones_tested_here() -> None:
    assert NAMES == ["decoder", "encoder"]


def test_family_when_name_is_wrong_lists_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"no model family `decodr`.*Did you mean `decoder`"):
        load_plugin(jobs.models, "decodr", what="model family")


def test_family_when_imported_offers_documented_functions(any_family: ModuleType) -> None:
    for name in ("build", "load", "save", "linear_names"):
        assert inspect.getdoc(getattr(any_family, name)), name
    assert inspect.getdoc(any_family)


def test_family_when_saved_and_loaded_gives_equal_logits(
    family: ModuleType, config: DecoderConfig, tmp_path: Path
) -> None:
    model = family.build(config, seed=0)
    tokens = torch.arange(20)[None]
    family.save(model, tmp_path, dtype=torch.float32)
    loaded = family.load(tmp_path)
    assert loaded.config == config.replace(head_dim=config.resolved_head_dim)
    logits = loaded(tokens)
    assert logits.shape == (1, 20, config.vocab_size)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(tokens))


def test_family_when_asked_for_linear_layers_names_modules_of_the_model(
    any_family: ModuleType,
) -> None:
    is_encoder = any_family.__name__ == "jobs.models.encoder"
    config = ENCODER if is_encoder else DecoderConfig(vocab_size=53, hidden_size=32, num_heads=4)
    model = any_family.build(config, seed=0)
    names = any_family.linear_names(model)
    assert names
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)


def test_family_when_a_linear_layer_is_replaced_uses_the_new_one(
    family: ModuleType, config: DecoderConfig
) -> None:
    model = family.build(config, seed=0)
    tokens = torch.arange(5)[None]
    before = model(tokens)
    name = family.linear_names(model)[-1]
    old = model.get_submodule(name)
    new = torch.nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    model.set_submodule(name, new)
    assert not torch.allclose(model(tokens), before, atol=1e-5)


def test_family_when_backpropagated_gives_every_parameter_a_gradient(
    family: ModuleType, config: DecoderConfig
) -> None:
    model = family.build(config, seed=0)
    logits = model(torch.arange(12)[None])
    torch.nn.functional.cross_entropy(logits[0], torch.arange(12)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_family_when_later_tokens_change_keeps_earlier_logits(
    family: ModuleType, config: DecoderConfig
) -> None:
    model = family.build(config, seed=0)
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 10:] = 50
    torch.testing.assert_close(model(tokens)[0, :10], model(changed)[0, :10])


def test_family_when_directory_is_no_model_raises_a_format_error(
    any_family: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ModelFormatError):
        any_family.load(tmp_path)


def test_encoder_when_saved_and_loaded_gives_equal_vectors(tmp_path: Path) -> None:
    family = load_plugin(jobs.models, "encoder", what="model family")
    model = family.build(ENCODER, seed=0)
    inputs = [[3, 4, 5], [6]]
    family.save(model, tmp_path, dtype=torch.float32)
    loaded = family.load(tmp_path)
    assert loaded.config == ENCODER
    vectors = loaded(inputs)
    assert vectors.shape == (2, ENCODER.hidden_size)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert torch.equal(vectors, model(inputs))
