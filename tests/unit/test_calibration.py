"""Calibration: what the text feeds each layer, block by block, in memory or on disk."""

import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.errors import StorageError
from jobs.compression.calibration import CalibrationPass, Scratch
from jobs.compression.inputs import LayerInputs
from jobs.compression.recipe import apply_recipe
from jobs.compression.shared_inputs import (
    HEAD,
    divide_input,
    feasible_scale,
    group_of,
    shared_inputs,
)
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.models.decoder import Decoder, build, linear_names

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2
)
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def example_model(**changes: object) -> Decoder:
    model = build(CONFIG.replace(**changes), seed=1)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(torch.rand(parameter.shape, generator=draws))
    return model


def example_text(sequences: int = 7, length: int = 1500) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    return torch.randint(CONFIG.vocab_size, (sequences, length), generator=draws)


def whole_pass(model: Decoder, text_NT: Tensor) -> dict[str, LayerInputs]:
    """Return every layer's moments from a plain forward pass that keeps all inputs."""
    seen: dict[str, Tensor] = {}
    for name in [*linear_names(model), HEAD]:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].flatten(0, -2))
        )
    with torch.no_grad():
        model(text_NT)
    return {
        name: LayerInputs(
            x_NI.T @ x_NI / len(x_NI), x_NI.abs().mean(0), x_NI.abs().amax(0), len(x_NI)
        )
        for name, x_NI in seen.items()
    }


def assert_alike(found: LayerInputs, expected: LayerInputs) -> None:
    assert found.num_tokens == expected.num_tokens
    torch.testing.assert_close(found.gram_II, expected.gram_II, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean_abs_I, expected.mean_abs_I, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.max_abs_I, expected.max_abs_I, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory_bytes", [2**30, 0])
def test_calibration_in_memory_and_on_disk_sees_what_a_whole_pass_sees(
    tmp_path: Path, memory_bytes: int
) -> None:
    text_NT = example_text(length=40)
    expected = whole_pass(example_model(), text_NT)
    with CalibrationPass(example_model(), text_NT, Scratch(tmp_path, memory_bytes)) as text:
        assert bool(list(tmp_path.iterdir())) is (memory_bytes == 0)
        for block in range(CONFIG.num_layers):
            names = [f"model.layers.{block}.{layer}" for layer in LAYERS]
            for name, found in text.observe(names).items():
                assert_alike(found, expected[name])
            text.advance()
        assert_alike(text.observe([HEAD])[HEAD], expected[HEAD])
    assert not list(tmp_path.iterdir())


def test_calibration_when_the_disk_does_not_hold_the_states_says_so(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # A file may not grow, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match=rf"keeping 35,840 bytes of states in {tmp_path}"):
            CalibrationPass(example_model(), example_text(length=40), Scratch(tmp_path, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_recipe_when_states_are_many_keeps_them_where_it_is_told(tmp_path: Path) -> None:
    seen = []
    recipe = Recipe(steps=(Step(method="wanda", options={"sparsity": 0.5}),))
    text = CalibrationText.of(example_text(length=40))

    def listen(what: str, done: int, total: int) -> None:
        seen.append(len(list(tmp_path.glob("*/states"))))

    apply_recipe(example_model(), recipe, text, listen, scratch=Scratch(tmp_path, 0))
    assert set(seen) == {1}
    assert not list(tmp_path.iterdir())


def test_observe_of_the_head_computes_no_logits() -> None:
    model = example_model()
    with CalibrationPass(model, example_text(length=40)) as text:
        for _ in range(CONFIG.num_layers):
            text.advance()
        ran: list[nn.Module] = []
        model.lm_head.register_forward_hook(lambda module, _, __: ran.append(module))
        assert text.observe([HEAD])[HEAD].num_tokens == 280
    assert ran == []


def test_calibration_when_text_goes_in_several_batches_sees_all_of_it() -> None:
    model, text_NT = example_model(max_seq_len=2000), example_text()
    name = "model.layers.0.mlp.down_proj"
    with CalibrationPass(model, text_NT) as text:
        found = text.observe([name])[name]
    assert found.num_tokens == text_NT.numel()
    assert_alike(found, whole_pass(example_model(max_seq_len=2000), text_NT)[name])


def test_calibration_when_a_block_was_changed_shows_later_blocks_what_it_makes_now() -> None:
    text_NT = example_text(length=40)
    changed = example_model()
    with torch.no_grad():
        changed.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(3.0)
    model = example_model()
    name = "model.layers.1.mlp.down_proj"
    with CalibrationPass(model, text_NT) as text:
        text.observe(["model.layers.0.self_attn.q_proj"])
        with torch.no_grad():
            model.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(3.0)
        text.advance()
        assert_alike(text.observe([name])[name], whole_pass(changed, text_NT)[name])


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_scaling_any_groups_input_changes_no_logits(shape: str, num_kv_heads: int) -> None:
    text_NT = example_text(sequences=2, length=12)
    changes = {"shape": shape, "num_kv_heads": num_kv_heads}
    model, same = example_model(**changes), example_model(**changes)
    draws = torch.Generator().manual_seed(5)
    for block in range(CONFIG.num_layers):
        for group in shared_inputs(block):
            linear = model.get_submodule(group.layers[0])
            assert isinstance(linear, nn.Linear)
            wanted_I = torch.rand(linear.in_features, generator=draws).mul(2).exp()
            scale_I = feasible_scale(model, group, wanted_I)
            before_OI = linear.weight.detach().clone()
            divide_input(model, group, scale_I)
            torch.testing.assert_close(linear.weight.detach(), before_OI * scale_I)
    torch.testing.assert_close(model(text_NT), same(text_NT), rtol=1e-4, atol=1e-4)


def test_feasible_scale_when_heads_share_values_is_the_mean_of_theirs() -> None:
    model = example_model(num_kv_heads=2)
    group = shared_inputs(0)[1]
    wanted_HD = torch.tensor([1.0, 4.0, 9.0, 1.0])[:, None].expand(4, 8)
    scale_HD = feasible_scale(model, group, wanted_HD.flatten()).view(4, 8)
    torch.testing.assert_close(scale_HD[:, 0], torch.tensor([2.0, 2.0, 3.0, 3.0]))
    assert torch.equal(feasible_scale(model, shared_inputs(0)[0], wanted_HD), wanted_HD)


def test_group_of_every_linear_layer_is_one_of_its_blocks() -> None:
    for name in linear_names(example_model()):
        group = group_of(name)
        assert group is not None
        assert name in group.layers
    assert group_of(HEAD) is None


def test_moments_when_inputs_are_divided_are_those_of_the_divided_inputs() -> None:
    model, text_NT = example_model(), example_text(length=40)
    group = shared_inputs(0)[2]
    scale_I = torch.linspace(0.5, 3.0, CONFIG.hidden_size)
    with CalibrationPass(model, text_NT) as text:
        before = text.observe([group.layers[0]])[group.layers[0]]
        divide_input(model, group, scale_I)
        after = text.observe([group.layers[0]])[group.layers[0]]
    assert_alike(before.divided_by(scale_I), after)


def test_squared_error_is_that_of_the_outputs() -> None:
    draws = torch.Generator().manual_seed(6)
    x_NI, difference_OI = torch.randn(50, 8, generator=draws), torch.randn(5, 8, generator=draws)
    inputs = LayerInputs(x_NI.T @ x_NI / 50, x_NI.abs().mean(0), x_NI.abs().amax(0), 50)
    expected = (x_NI @ difference_OI.T).square().sum() / 50
    torch.testing.assert_close(inputs.squared_error(difference_OI), expected)


def exact_effect(model: Decoder, layer: str, text_NT: Tensor) -> Tensor:
    """Return the first block's effect_O of a layer from all its derivatives."""
    states_NTC = model.model.embed_tokens(text_NT)
    rotation = model.rotary(torch.arange(text_NT.shape[1])[None], torch.float32)
    kept: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, inputs, output: kept.append(output))
    after = model.model.layers[0](states_NTC, *rotation)
    handle.remove()
    squares = torch.zeros_like(kept[0])
    for value in after.flatten():
        (slope,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        squares += slope.square()
    return squares.flatten(0, 1).sum(dim=0) / text_NT.numel()


def test_effects_when_probed_by_signs_are_near_all_derivatives() -> None:
    model = example_model(initializer_range=0.5)
    layers = [f"model.layers.0.{name}" for name in ("self_attn.v_proj", "mlp.gate_proj")]
    text_NT = example_text(2, 6)
    many_NT = text_NT.repeat(600, 1)  # The same tokens again, with other signs.
    with CalibrationPass(model, many_NT) as text:
        found = text.effects(layers)
    for layer in layers:
        exact_O = exact_effect(model, layer, text_NT)
        assert exact_O.max() > 2 * exact_O.min()
        assert torch.allclose(found[layer], exact_O, rtol=0.2)


def test_effects_when_outputs_are_added_to_the_stream_are_one() -> None:
    layer = "model.layers.0.mlp.down_proj"
    with CalibrationPass(example_model(), example_text(2, 40)) as text:
        assert torch.equal(text.effects([layer])[layer], torch.ones(CONFIG.hidden_size))
