import pytest
from search_fakes import DECODER, config, space

from cluster.errors import ConfigError
from jobs.compression.recipe import layouts, predicted_bytes
from jobs.config import CalibrationConfig, DecoderConfig, Recipe
from jobs.search.space import UNCHANGED, Assignment, Space, build_space, layer_groups

TEXT = CalibrationConfig(data="d")


def _mixed(of: Space) -> Assignment:
    return tuple(number % len(of.choices) for number in range(len(of.groups)))


@pytest.mark.parametrize("granularity", ["part", "fused"])
@pytest.mark.parametrize("layers_per_group", [1, 2, 3])
def test_recipe_when_choices_are_mixed_gives_each_group_its_own(
    granularity: str, layers_per_group: int
) -> None:
    of = space(
        granularity=granularity,
        layers_per_group=layers_per_group,
        schemes=("bf16", "w8a8", "w4a16", "w3a16"),
    )
    assignment = _mixed(of)
    found = layouts(DECODER, of.recipe(assignment, real=True))
    for group, number in zip(of.groups, assignment, strict=True):
        prefixes = tuple(target.removesuffix("*") for target in group.targets)
        mine = {layout.scheme for name, layout in found.items() if name.startswith(prefixes)}
        assert mine == {of.choices[number].scheme}


@pytest.mark.parametrize("granularity", ["part", "fused"])
def test_size_bytes_when_choices_are_mixed_is_what_the_recipe_is_predicted_to_take(
    granularity: str,
) -> None:
    of = space(granularity=granularity, schemes=("bf16", "w8a8", "w4a8", "w3a16"))
    for assignment in (UNCHANGED, of.uniform(1), _mixed(of)):
        recipe = of.recipe(assignment, real=False)
        assert of.size_bytes(assignment) == predicted_bytes(DECODER, recipe)


def test_memory_bytes_when_int3_is_chosen_are_those_of_int4() -> None:
    three, four = (space(schemes=(scheme,)) for scheme in ("w3a16", "w4a16"))
    assert three.memory_bytes(three.uniform(0)) == four.memory_bytes(four.uniform(0))
    assert three.size_bytes(three.uniform(0)) < four.size_bytes(four.uniform(0))


def test_groups_when_layers_are_fused_divide_no_product() -> None:
    parts = [group.part for group in layer_groups(DECODER, 4, "fused")]
    assert parts == ["qkv", "o", "gate_up", "down"]


def test_recipe_when_all_groups_are_equal_is_one_step_for_all() -> None:
    of = space()
    steps = of.recipe(of.uniform(len(of.choices) - 1), real=True).steps
    assert [step.targets for step in steps] == [("*",)]


def test_recipe_when_it_is_real_takes_the_methods_that_are_asked_for() -> None:
    of = space(quantizer="awq+gptq", sparsities=(0.5,), pruning="sparsegpt", calibration=TEXT)
    w8a8 = of.uniform([choice.scheme for choice in of.choices].index("w8a8"))
    real, plain = (of.recipe(w8a8, real=each) for each in (True, False))
    assert [step.method for step in real.steps] == ["sparsegpt", "awq", "gptq"]
    assert [step.method for step in plain.steps] == ["magnitude", "rtn"]


def test_recipe_when_pruned_weights_are_repaired_does_so_before_quantizing() -> None:
    of = space(sparsities=(0.0, 0.5), repair_tokens=1000, calibration=TEXT, schemes=("w8a8",))
    plain, pruned = (of.recipe(of.uniform(c), real=True) for c in range(2))
    assert [step.method for step in plain.steps] == ["rtn"]
    assert [step.method for step in pruned.steps] == ["magnitude", "distill", "rtn"]


def test_recipe_when_nothing_is_changed_has_no_steps() -> None:
    of = space()
    assert of.recipe(UNCHANGED, real=True) == Recipe()
    assert of.recipe(of.uniform(0), real=True) == Recipe()


def test_alone_when_a_group_is_chosen_touches_its_layers_only() -> None:
    of = space(granularity="fused", layers_per_group=1, schemes=("bf16", "w8a8"))
    recipe = of.alone(4, 1)  # qkv of block 1
    changed = {n for n, layout in layouts(DECODER, recipe).items() if layout.scheme == "w8a8"}
    assert changed == {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}


def test_describe_when_choices_are_mixed_says_which_blocks() -> None:
    of = space(schemes=("bf16", "w8a8"))
    assert of.describe(UNCHANGED) == "bf16"
    assert of.describe(of.uniform(1)) == "w8a8 all"
    assert of.describe((1, 0, 0, 1)) == "bf16 mlp 0-1, self_attn 2-3; w8a8 self_attn 0-1, mlp 2-3"


def test_build_space_when_only_the_unchanged_model_is_left_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to try"):
        space(schemes=("bf16",))


def test_build_space_when_widths_are_small_takes_a_smaller_group() -> None:
    decoder = DecoderConfig(hidden_size=96, intermediate_size=192, num_heads=3, num_kv_heads=3)
    of = build_space(config(schemes=("w4a16",)), decoder)
    assert of.recipe(of.uniform(0), real=True).steps[0].options["group_size"] == 32


def test_build_space_when_no_group_divides_the_widths_is_refused() -> None:
    decoder = DecoderConfig(hidden_size=40, intermediate_size=80, num_heads=2, num_kv_heads=1)
    with pytest.raises(ConfigError, match="Leave w8a16, w4a16, w4a8, w3a16 out"):
        build_space(config(schemes=("w4a16",)), decoder)


def test_config_when_a_method_has_to_see_text_and_there_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="gptq has to see text: give `calibration`"):
        config(quantizer="gptq")
    with pytest.raises(ValueError, match="repair_tokens has to see text"):
        config(repair_tokens=100, sparsities=(0.5,))
    with pytest.raises(ValueError, match="wanda has to see text"):
        config(pruning="wanda", sparsities=(0.5,))
