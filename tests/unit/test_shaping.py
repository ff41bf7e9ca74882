"""Depth and width pruning: what is left out is what gives least."""

import pytest
import torch
from torch import Tensor

from cluster.errors import RecipeError
from jobs.compression.methods import depth, width
from jobs.compression.recipe import apply_recipe, final_shape, layouts, predicted_bytes
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.models.decoder import Decoder, build

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2
)
TEXT = torch.randint(61, (6, 20), generator=torch.Generator().manual_seed(4))


def logits_of(model: Decoder) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TEXT)
    return result


def silence(model: Decoder, layer: str, columns: slice) -> None:
    """Make a layer ignore some of its inputs."""
    with torch.no_grad():
        model.get_submodule(layer).weight[:, columns] = 0.0


@pytest.mark.parametrize("first", [0, 1, 2])
def test_depth_when_two_blocks_do_nothing_leaves_them_out(first: int) -> None:
    model = build(CONFIG, seed=0)
    for block in (first, first + 1):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            silence(model, f"model.layers.{block}.{part}", slice(None))
    before = logits_of(model)
    depth.cut(model, TEXT, depth.Options(num_blocks=2))
    assert model.config.num_layers == 2
    assert [block.mlp.layer for block in model.model.layers] == [0, 1]
    torch.testing.assert_close(logits_of(model), before)


def test_depth_when_told_which_leaves_those_out() -> None:
    model, whole = build(CONFIG, seed=0), build(CONFIG, seed=0)
    depth.cut(model, TEXT, depth.Options(num_blocks=2, first=0))
    assert torch.equal(
        model.get_submodule("model.layers.0.mlp.up_proj").weight,
        whole.get_submodule("model.layers.2.mlp.up_proj").weight,
    )


def test_width_when_channels_and_heads_give_nothing_leaves_them_out() -> None:
    model = build(CONFIG, seed=0)
    for block in range(CONFIG.num_layers):
        silence(model, f"model.layers.{block}.mlp.down_proj", slice(10, 42))
        silence(model, f"model.layers.{block}.self_attn.o_proj", slice(32, 64))
    before = logits_of(model)
    width.cut(model, TEXT, width.Options(intermediate_size=64, num_kv_heads=1))
    config = model.config
    assert (config.intermediate_size, config.num_kv_heads, config.num_heads) == (64, 1, 2)
    assert config.resolved_head_dim == CONFIG.resolved_head_dim
    torch.testing.assert_close(logits_of(model), before)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("depth", {"num_blocks": 4}, "num_blocks=4 from block 0 on cannot be left out of 4"),
        ("depth", {"num_blocks": 2, "first": 3}, "num_blocks=2 from block 3 on"),
        ("width", {"intermediate_size": 97}, "intermediate_size=97 is more than the 96"),
        ("width", {}, "nothing would be left out"),
    ],
)
def test_recipe_when_there_is_no_such_shape_names_step_and_remedy(
    method: str, options: dict[str, object], words: str
) -> None:
    recipe = Recipe(steps=(Step(method=method, options=options),))
    with pytest.raises(RecipeError, match=rf"step 1 \({method}\): .*{words}"):
        predicted_bytes(CONFIG, recipe)


def test_recipe_when_it_cuts_then_quantizes_predicts_shape_and_layers() -> None:
    steps = (
        Step(method="depth", options={"num_blocks": 1}),
        Step(method="width", options={"intermediate_size": 64}),
        Step(method="gptq", options={"scheme": "w4a16", "group_size": 32}),
        Step(method="rtn", targets=("model.layers.2.*",), options={"scheme": "w8a8"}),
    )
    recipe = Recipe(steps=steps)
    compressed = apply_recipe(build(CONFIG, seed=0), recipe, CalibrationText.of(TEXT))
    assert compressed.model.config == final_shape(CONFIG, recipe)
    assert compressed.model.config.num_layers == 3
    chosen = layouts(CONFIG, recipe)
    assert list(chosen) == list(compressed.quantized)
    assert compressed.scheme_of("model.layers.2.mlp.up_proj") == "w8a8"
    assert compressed.scheme_of("model.layers.1.mlp.up_proj") == "w4a16"


def test_recipe_when_it_quantizes_before_it_cuts_is_refused() -> None:
    steps = (
        Step(method="rtn", options={"scheme": "w8a8"}),
        Step(method="depth", options={"num_blocks": 1}),
    )
    with pytest.raises(RecipeError, match=r"step 2 \(depth\).*step 1 has quantized"):
        predicted_bytes(CONFIG, Recipe(steps=steps))


def test_recipe_when_a_cut_has_targets_is_refused() -> None:
    step = Step(method="depth", targets=("*mlp*",), options={"num_blocks": 1})
    with pytest.raises(RecipeError, match=r"step 1 \(depth\).*Leave `targets` out"):
        predicted_bytes(CONFIG, Recipe(steps=(step,)))
