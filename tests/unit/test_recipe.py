"""Recipes: which layers a step reaches, which step wins, and what is refused."""

import gc

import pytest
import torch

from cluster.errors import RecipeError
from jobs.compression.recipe import apply_recipe, layouts, predicted_bytes
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.kernels.formats import GROUPED, Layout
from jobs.models.decoder import Decoder, build, linear_names

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2
)


def quantize(scheme: str, *targets: str, group_size: int = 32) -> Step:
    groups = {"group_size": group_size} if scheme in GROUPED else {}
    options = {"scheme": scheme, **groups}
    return Step(method="rtn", targets=targets or ("*",), options=options)


def prune(sparsity: float, *targets: str) -> Step:
    return Step(method="magnitude", targets=targets or ("*",), options={"sparsity": sparsity})


def weight_of(model: Decoder, layer: str) -> torch.Tensor:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().clone()


def test_recipe_when_empty_leaves_the_model_dense() -> None:
    compressed = apply_recipe(build(CONFIG, seed=0), Recipe())
    expected = build(CONFIG, seed=0).state_dict()
    assert compressed.quantized == {}
    assert all(torch.equal(t, expected[n]) for n, t in compressed.model.state_dict().items())


def test_recipe_when_quantizing_leaves_what_the_integers_stand_for() -> None:
    compressed = apply_recipe(build(CONFIG, seed=0), Recipe(steps=(quantize("w4a16"),)))
    assert list(compressed.quantized) == linear_names(compressed.model)
    for layer, quantized in compressed.quantized.items():
        assert torch.equal(weight_of(compressed.model, layer), quantized.dequantize())
        assert compressed.scheme_of(layer) == "w4a16"
    assert compressed.scheme_of("lm_head") == "bf16"


def test_recipe_when_steps_overlap_takes_the_last_from_the_unquantized_weight() -> None:
    down = "*.mlp.down_proj"
    twice = apply_recipe(
        build(CONFIG, seed=0), Recipe(steps=(quantize("w4a16"), quantize("w8a8", down)))
    )
    once = apply_recipe(build(CONFIG, seed=0), Recipe(steps=(quantize("w8a8", down),)))
    layer = "model.layers.1.mlp.down_proj"
    assert twice.scheme_of(layer) == "w8a8"
    assert twice.scheme_of("model.layers.1.mlp.up_proj") == "w4a16"
    assert torch.equal(weight_of(twice.model, layer), weight_of(once.model, layer))


def test_recipe_when_a_later_step_says_bf16_leaves_that_layer_dense() -> None:
    layer = "model.layers.0.self_attn.q_proj"
    compressed = apply_recipe(
        build(CONFIG, seed=0), Recipe(steps=(quantize("w8a8"), quantize("bf16", layer)))
    )
    original = weight_of(build(CONFIG, seed=0), layer)
    assert compressed.scheme_of(layer) == "bf16"
    assert torch.equal(weight_of(compressed.model, layer), original.bfloat16().float())


def test_recipe_when_pruned_then_quantized_keeps_the_zeros() -> None:
    compressed = apply_recipe(build(CONFIG, seed=0), Recipe(steps=(prune(0.5), quantize("w4a16"))))
    for quantized in compressed.quantized.values():
        assert (quantized.values_OI == 0).float().mean() >= 0.5


def test_recipe_when_pruning_follows_quantizing_is_refused() -> None:
    recipe = Recipe(steps=(quantize("w8a8"), prune(0.5, "*q_proj")))
    with pytest.raises(RecipeError, match=r"step 2 \(magnitude\).*step 1.*Put pruning"):
        apply_recipe(build(CONFIG, seed=0), recipe)


def test_recipe_when_pruning_follows_a_step_that_left_layers_dense_prunes_them() -> None:
    steps = (quantize("w8a8"), quantize("bf16", "*q_proj"), prune(0.5, "*q_proj"))
    compressed = apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps))
    layer = "model.layers.1.self_attn.q_proj"
    assert compressed.scheme_of(layer) == "bf16"
    assert (weight_of(compressed.model, layer) == 0).float().mean() == 0.5


def test_plan_when_a_pattern_does_not_divide_names_the_layer() -> None:
    steps = (step("wanda", pattern="2:4"), step("magnitude", "*down_proj", pattern="4:64"))
    words = r"step 2 \(magnitude\): pattern=4:64 .* 96 inputs of `model\.layers\.0\.mlp\.down_proj`"
    with pytest.raises(RecipeError, match=words):
        predicted_bytes(CONFIG, Recipe(steps=steps))


def test_recipe_when_the_last_repair_is_done_holds_the_dense_model_no_longer() -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), Decoder) for each in gc.get_objects())

    before, heard = alive(), {}
    repair = step("distill", num_tokens=64, batch_size=2, seq_len=8, precision="fp32")
    recipe = Recipe(steps=(prune(0.5), repair, step("gptq", scheme="w8a8")))

    def listen(what: str, done: int, total: int) -> None:
        heard[what.partition(",")[0]] = alive() - before

    apply_recipe(build(CONFIG, seed=0), recipe, TEXT, listen)
    assert heard == {"step 2 (distill)": 2, "blocks": 1}


def test_recipe_when_target_matches_nothing_lists_close_names() -> None:
    recipe = Recipe(steps=(quantize("w8a8", "model.layers.0.mlp.down_prj"),))
    with pytest.raises(RecipeError, match=r"down_prj.*matches no.*model.layers.0.mlp.down_proj"):
        predicted_bytes(CONFIG, recipe)


@pytest.mark.parametrize("target", ["lm_hea*", "model.embed_tokens", "model.layers.2.*"])
def test_recipe_when_target_is_no_linear_layer_of_a_block_is_refused(target: str) -> None:
    with pytest.raises(RecipeError, match="matches no linear layer"):
        layouts(CONFIG, Recipe(steps=(quantize("w8a8", target),)))


def test_recipe_when_group_size_does_not_divide_names_sizes_that_do() -> None:
    recipe = Recipe(steps=(quantize("w4a16", "*down_proj", group_size=128),))
    with pytest.raises(RecipeError, match=r"group_size=128 does not divide the 96 .*: 16, 32\."):
        apply_recipe(build(CONFIG, seed=0), recipe)


def test_recipe_when_method_is_unknown_lists_methods() -> None:
    recipe = Recipe(steps=(Step(method="rnt"),))
    with pytest.raises(RecipeError, match=r"no compression method `rnt`.*Did you mean `rtn`"):
        predicted_bytes(CONFIG, recipe)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shceme": "w8a8"}, "did you mean `scheme`"),
        ({"scheme": "w3a16"}, "scheme"),
        ({"scheme": "w4a16", "group_size": 48}, "power of 2"),
        ({"scheme": "w8a8", "group_size": 64}, "w8a8 has no groups and group_size=64.*Leave it"),
        ({"scheme": "bf16", "group_size": 128}, "bf16 has no groups"),
        ({"group_size": None}, "w8a8 has no groups and group_size=None"),
    ],
)
def test_recipe_when_an_option_is_wrong_names_it(options: dict[str, object], words: str) -> None:
    recipe = Recipe(steps=(Step(method="rtn", options=options),))
    with pytest.raises(RecipeError, match=words):
        predicted_bytes(CONFIG, recipe)


def test_layouts_when_recipe_is_mixed_name_every_linear_layer() -> None:
    chosen = layouts(CONFIG, Recipe(steps=(quantize("w4a16", "*layers.0*"),)))
    assert list(chosen) == linear_names(build(CONFIG, seed=0))
    assert chosen["model.layers.0.mlp.up_proj"] == Layout("w4a16", 32)
    assert chosen["model.layers.1.mlp.up_proj"] == Layout("bf16")


def test_recipe_when_it_names_the_tied_head_gives_it_a_weight_of_its_own() -> None:
    model = build(CONFIG, seed=0)
    embedding = model.model.embed_tokens.weight.detach().clone()
    compressed = apply_recipe(model, Recipe(steps=(quantize("w8a8", "*", "lm_head"),)))
    assert not compressed.model.config.tie_embeddings
    assert compressed.scheme_of("lm_head") == "w8a8"
    assert torch.equal(weight_of(compressed.model, "model.embed_tokens"), embedding)
    assert not torch.equal(weight_of(compressed.model, "lm_head"), embedding)


def test_layouts_when_a_pattern_reaches_everything_leave_the_head_out() -> None:
    assert "lm_head" not in layouts(CONFIG, Recipe(steps=(quantize("w8a8", "*"),)))
    assert layouts(CONFIG, Recipe(steps=(quantize("w8a8", "lm_head"),)))["lm_head"].scheme == "w8a8"


def test_mse_observer_when_weights_have_outliers_errs_less_than_minmax() -> None:
    errors = {}
    for observer in ("minmax", "mse"):
        model = build(CONFIG, seed=0)
        layer = "model.layers.0.mlp.gate_proj"
        with torch.no_grad():
            model.get_submodule(layer).weight[:, ::16] *= 4
        original = weight_of(model, layer)
        step = Step(method="rtn", options={"scheme": "w4a16", "observer": observer})
        compressed = apply_recipe(
            model, Recipe(steps=(step.replace(options={**step.options, "group_size": 32}),))
        )
        errors[observer] = float((weight_of(compressed.model, layer) - original).square().sum())
    assert errors["mse"] < 0.95 * errors["minmax"]


TEXT = CalibrationText.of(torch.randint(61, (16, 32), generator=torch.Generator().manual_seed(4)))


def step(method: str, *targets: str, **options: object) -> Step:
    return Step(method=method, targets=targets or ("*",), options=options)


def outputs_error(recipe: Recipe) -> float:
    """Return how far the logits of other text move."""
    text = torch.randint(61, (8, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = build(CONFIG, seed=0)(text)
        after = apply_recipe(build(CONFIG, seed=0), recipe, TEXT).model(text)
    return float((after - before).square().mean())


def test_recipe_when_a_method_sees_text_moves_logits_less_than_without() -> None:
    format_ = {"scheme": "w4a16", "group_size": 32}
    nearest = outputs_error(Recipe(steps=(step("rtn", **format_),)))
    made_up = outputs_error(Recipe(steps=(step("gptq", **format_),)))
    assert made_up < 0.8 * nearest


def test_recipe_when_pruned_by_text_then_quantized_keeps_the_zeros() -> None:
    steps = (step("sparsegpt", sparsity=0.5), step("gptq", scheme="w4a16", group_size=32))
    compressed = apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps), TEXT)
    for layer, quantized in compressed.quantized.items():
        assert (quantized.values_OI == 0).float().mean() >= 0.5, layer


def test_recipe_when_inputs_are_scaled_quantizes_the_scaled_weights() -> None:
    quantized = step("rtn", scheme="w8a8")
    compressed = apply_recipe(
        build(CONFIG, seed=0), Recipe(steps=(step("smoothquant"), quantized)), TEXT
    )
    norm = compressed.model.get_submodule("model.layers.0.input_layernorm").weight
    assert not torch.equal(norm, torch.ones_like(norm))
    with torch.no_grad():
        logits = build(CONFIG, seed=0)(TEXT.tokens_NT)
    assert outputs_error(compressed.recipe) < 1e-2 * float(logits.var())


def test_recipe_when_only_the_head_sees_text_observes_it_after_all_blocks() -> None:
    recipe = Recipe(steps=(step("gptq", "lm_head", scheme="w8a8"),))
    done: list[tuple[str, int, int]] = []
    compressed = apply_recipe(
        build(CONFIG, seed=0), recipe, TEXT, lambda *heard: done.append(heard)
    )
    assert list(compressed.quantized) == ["lm_head"]
    assert done == [("blocks", number, 3) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((step("gptq", scheme="w4a16", group_size=32),), r"step 1 \(gptq\).*Give `calibration`"),
        ((step("awq"), step("rtn", scheme="w8a8")), r"step 1 \(awq\).*Give `calibration`"),
    ],
)
def test_recipe_when_there_is_no_text_says_to_give_some(
    steps: tuple[Step, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((step("awq"),), r"step 1 \(awq\) prepares .* no later step.*rtn or gptq"),
        ((quantize("w4a16"), step("awq")), r"step 2 \(awq\).*step 1 has quantized"),
        (
            (quantize("w4a16", "*v_proj"), step("awq", "*o_proj"), quantize("w4a16", "*o_proj")),
            r"step 2 \(awq\).*v_proj.*step 1 has quantized",
        ),
        (
            (step("smoothquant", "lm_head"), quantize("w8a8", "lm_head")),
            "nothing can scale.*`lm_head`",
        ),
        (
            (step("wanda", pattern="3:5"),),
            r"step 1 \(wanda\): pattern=3:5 .* 64 inputs of `model\.layers\.0\.",
        ),
        (
            (step("awq"), step("depth", num_blocks=1), quantize("w8a8")),
            r"step 1 \(awq\).*step 2 \(depth\).*Put depth/width before awq/smoothquant",
        ),
        (
            (step("smoothquant"), step("width", intermediate_size=64), quantize("w8a8")),
            r"step 1 \(smoothquant\).*step 2 \(width\).*Put depth/width before",
        ),
    ],
)
def test_recipe_when_a_step_cannot_be_applied_says_which_and_why(
    steps: tuple[Step, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        apply_recipe(build(CONFIG, seed=0), Recipe(steps=steps), TEXT)
