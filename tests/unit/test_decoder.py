"""The decoder against transformers: logits, gradients, and files in both directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from jobs.config import DecoderConfig, RopeScaling
from jobs.models import _hf, decoder

TOLERANCE = 1e-4
TINY = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_range=0.3,
)
LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=16,
)
VARIANTS = {
    "llama": TINY,
    "llama-untied": TINY.replace(tie_embeddings=False),
    "llama-all-heads": TINY.replace(num_kv_heads=4),
    "llama-one-kv-head": TINY.replace(num_kv_heads=1, rope_theta=500_000.0),
    "llama-head-dim": TINY.replace(head_dim=16),
    "llama-linear": TINY.replace(rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "llama-llama3": TINY.replace(rope_scaling=LLAMA3, norm_eps=1e-6),
    "qwen2": TINY.replace(shape="qwen2"),
    "qwen2-window": TINY.replace(shape="qwen2", sliding_window=5, tie_embeddings=False),
    "qwen2-head-dim": TINY.replace(shape="qwen2", head_dim=16),
    "qwen3": TINY.replace(shape="qwen3"),
    "qwen3-head-dim": TINY.replace(shape="qwen3", head_dim=20, hidden_size=36, num_heads=8),
    "qwen3-window": TINY.replace(shape="qwen3", sliding_window=7, tie_embeddings=False),
    "mistral": TINY.replace(shape="mistral", tie_embeddings=False),
    "mistral-window": TINY.replace(shape="mistral", sliding_window=3),
    "mistral-head-dim": TINY.replace(shape="mistral", head_dim=6),
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def randomized(config: DecoderConfig) -> decoder.Decoder:
    """A decoder whose norms and biases are random too, so that a test sees them."""
    model = decoder.build(config, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def load_reference(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    decoder.save(randomized(TINY), tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_when_transformers_loads_what_we_save_are_equal(
    config: DecoderConfig, tmp_path: Path
) -> None:
    model = randomized(config)
    decoder.save(model, tmp_path, dtype=torch.float32)
    reference = load_reference(tmp_path)
    assert type(reference).__name__ == _hf.ARCHITECTURES[config.shape]
    expected = reference(tokens(2, 33)).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(model(tokens(2, 33)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_when_we_load_what_transformers_saves_are_equal(
    config: DecoderConfig, tmp_path: Path
) -> None:
    decoder.save(randomized(config), tmp_path / "ours", dtype=torch.float32)
    reference = load_reference(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    model = decoder.load(tmp_path / "theirs")
    assert model.config == config.replace(head_dim=config.resolved_head_dim)
    torch.testing.assert_close(
        model(tokens(2, 33)), reference(tokens(2, 33)).logits, atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "mistral"])
def test_state_dict_when_compared_to_transformers_has_the_same_keys_and_shapes(
    shape: str, tmp_path: Path
) -> None:
    model = decoder.build(VARIANTS[shape], seed=0)
    decoder.save(model, tmp_path)
    expected = {
        name: tensor.shape for name, tensor in load_reference(tmp_path).state_dict().items()
    }
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected


@torch.no_grad()
def test_bfloat16_when_loaded_by_both_stays_near_transformers(tmp_path: Path) -> None:
    decoder.save(decoder.build(TINY.replace(initializer_range=0.1), seed=0), tmp_path)
    model = decoder.load(tmp_path, torch.bfloat16)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reference.dtype == torch.bfloat16
    logits = model(tokens(2, 20))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference(tokens(2, 20)).logits.float(), atol=0.05, rtol=0)


@torch.no_grad()
def test_positions_when_given_shift_the_rotation_as_in_transformers(saved: Path) -> None:
    positions = torch.arange(20, 30)[None]
    expected = load_reference(saved)(tokens(1, 10), position_ids=positions).logits
    found = decoder.load(saved)(tokens(1, 10), positions)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_forward_when_split_into_hidden_and_head_is_the_same(saved: Path) -> None:
    model = decoder.load(saved)
    hidden = model.hidden(tokens(2, 9))
    assert hidden.shape == (2, 9, TINY.hidden_size)
    torch.testing.assert_close(model.head(hidden[:, -1]), model(tokens(2, 9))[:, -1])


def gradients(model: torch.nn.Module, *, is_bfloat16: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
        output = model(tokens(2, 40))
        logits = output if isinstance(output, torch.Tensor) else output.logits
    flat = logits.float().flatten(0, 1)
    torch.nn.functional.cross_entropy(flat, tokens(2, 40).flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_when_in_float32_equal_those_of_transformers(saved: Path) -> None:
    found = gradients(decoder.load(saved), is_bfloat16=False)
    expected = gradients(load_reference(saved), is_bfloat16=False)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


def test_gradients_when_in_bfloat16_are_about_as_exact_as_those_of_transformers(
    saved: Path,
) -> None:
    model, reference = decoder.load(saved), load_reference(saved)
    exact = gradients(model, is_bfloat16=False)
    ours, theirs = gradients(model, is_bfloat16=True), gradients(reference, is_bfloat16=True)
    for name, gradient in exact.items():
        our_error, their_error = (ours[name] - gradient).norm(), (theirs[name] - gradient).norm()
        assert our_error <= 2 * their_error, f"{name}: {our_error} against {their_error}"


def test_build_when_seed_is_equal_gives_equal_weights_and_otherwise_not() -> None:
    first, second, other = (decoder.build(TINY, seed) for seed in (5, 5, 6))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_build_when_fresh_predicts_uniformly_with_scaled_residual_layers() -> None:
    model = decoder.build(TINY.replace(hidden_size=128, num_layers=8, initializer_range=0.02), 0)
    block = model.model.layers[0]
    assert block.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert model(tokens(1, 30)).detach().std() < 0.5


def test_linear_names_when_asked_are_huggingface_names_in_order_without_head() -> None:
    names = decoder.linear_names(decoder.build(TINY, seed=0))
    assert len(names) == 7 * TINY.num_layers
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert names[-1] == "model.layers.2.mlp.down_proj"


def test_save_when_weights_exceed_a_shard_writes_shards_that_both_load(tmp_path: Path) -> None:
    model = randomized(TINY.replace(tie_embeddings=False))
    decoder.save(model, tmp_path, dtype=torch.float32, max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    with torch.no_grad():
        expected = model(tokens(1, 12))
        torch.testing.assert_close(decoder.load(tmp_path)(tokens(1, 12)), expected)
        found = load_reference(tmp_path)(tokens(1, 12)).logits
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_save_when_tied_stores_the_embedding_once_in_bfloat16(tmp_path: Path) -> None:
    decoder.save(decoder.build(TINY, seed=0), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        dtypes = {file.get_tensor(name).dtype for name in names}
    assert "lm_head.weight" not in names
    assert dtypes == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_save_when_tokens_are_set_writes_generation_config(tmp_path: Path) -> None:
    decoder.save(decoder.build(TINY.replace(bos_token_id=1, eos_token_id=2), seed=0), tmp_path)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)
    assert _hf.stop_token_ids(tmp_path) == {2}


def test_half_precision_when_cast_keeps_rotary_frequencies_in_float32() -> None:
    model = decoder.build(TINY, seed=0).to(torch.bfloat16)
    assert model.rotary.frequencies_D.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks, and hides it.
def test_compile_when_applied_to_each_block_makes_one_graph_for_all() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = decoder.build(TINY, seed=0)
    expected = model(tokens(2, 16))
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(model(tokens(2, 16)), expected, atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Doubling:
    """Adapters that add every layer's output to itself, and remember which were asked."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def add(self, layer_name: str, x_TC: torch.Tensor, y_TO: torch.Tensor) -> None:
        self.shapes[layer_name] = (x_TC.shape, y_TO.shape)
        y_TO.add_(y_TO.clone())


def test_hidden_when_adapters_are_given_adds_them_to_every_linear_layer() -> None:
    config = DecoderConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2
    )
    model = decoder.build(config, seed=0).eval()
    tokens_BT = torch.arange(10).view(2, 5)
    adapters = Doubling()
    with torch.no_grad():
        found = model.hidden(tokens_BT, adapters=adapters)
        for name in decoder.linear_names(model):
            model.get_submodule(name).weight.mul_(2)
        expected = model.hidden(tokens_BT)
    assert set(adapters.shapes) == set(decoder.linear_names(model))
    assert adapters.shapes["model.layers.1.mlp.down_proj"] == ((10, 24), (10, 16))
    torch.testing.assert_close(found, expected)
