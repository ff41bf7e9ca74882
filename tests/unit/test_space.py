import pytest

from cluster.config import parse_config
from cluster.errors import ConfigError
from jobs.compression.recipe import layouts, predicted_bytes
from jobs.config import DecoderConfig, Recipe, SearchConfig
from jobs.search.space import describe, layer_groups, proposals

DECODER = DecoderConfig(num_layers=6)


def _config(**changes: object) -> SearchConfig:
    values: dict[str, object] = {"name": "s", "model": "m", "data": "d"}
    return SearchConfig.model_validate({**values, **changes})


def test_proposals_when_made_twice_are_equal_and_distinct() -> None:
    first, second = (proposals(_config(num_trials=20), DECODER) for _ in range(2))
    assert first == second
    assert len(first) == 20
    assert len({recipe.model_dump_json() for recipe in first}) == 20


def test_proposals_when_the_seed_differs_differ() -> None:
    first = proposals(_config(num_trials=10), DECODER)
    assert first != proposals(_config(num_trials=10, seed=1), DECODER)


def test_proposals_when_made_begin_with_every_uniform_recipe() -> None:
    found = proposals(_config(), DECODER)
    assert [describe(recipe) for recipe in found[:3]] == ["bf16", "w4a16 all", "w8a8 all"]


def test_proposals_when_room_is_left_hold_single_group_variations_that_fit() -> None:
    config = _config()
    found = proposals(config, DECODER)
    limit = config.gate.max_size_ratio * predicted_bytes(DECODER, Recipe())
    others = found[3:]
    assert all(predicted_bytes(DECODER, recipe) <= limit for recipe in others)
    assert any(describe(r).startswith("w4a16") and "w8a8 mlp 0-1" in describe(r) for r in others)


def test_proposals_when_the_space_is_small_gives_all_of_it() -> None:
    config = _config(schemes=("w8a8", "w4a16"), layers_per_group=6, num_trials=50)
    assert len(proposals(config, DECODER)) == 4


def test_proposals_when_applied_name_existing_layers_only() -> None:
    for recipe in proposals(_config(sparsities=(0.0, 0.5), num_trials=40), DECODER):
        formats = layouts(DECODER, recipe)
        assert len(formats) == 6 * 7
        if describe(recipe) == "w8a8 all":
            assert {layout.scheme for layout in formats.values()} == {"w8a8"}


def test_proposals_when_a_group_differs_its_layers_share_the_choice() -> None:
    for recipe in proposals(_config(num_trials=30), DECODER):
        schemes = {name: layout.scheme for name, layout in layouts(DECODER, recipe).items()}
        for group in layer_groups(DECODER, 2):
            blocks = range(group.first, group.stop)
            names = [n for n in schemes if n.split(".")[3] == group.part]
            assert len({schemes[n] for n in names if int(n.split(".")[2]) in blocks}) == 1


def test_proposals_when_pruning_is_offered_put_it_before_quantizing() -> None:
    found = proposals(_config(sparsities=(0.0, 0.5), num_trials=40), DECODER)
    both = [r for r in found if {s.method for s in r.steps} == {"magnitude", "rtn"}]
    assert both
    assert all(recipe.steps[0].method == "magnitude" for recipe in both)


def test_proposals_when_widths_are_small_take_a_smaller_group() -> None:
    decoder = DecoderConfig(hidden_size=96, intermediate_size=192, num_heads=3, num_kv_heads=3)
    found = proposals(_config(schemes=("w4a16",)), decoder)
    assert found[0].steps[0].options["group_size"] == 32


def test_proposals_when_no_group_divides_the_widths_is_refused() -> None:
    decoder = DecoderConfig(hidden_size=40, intermediate_size=80, num_heads=2, num_kv_heads=1)
    with pytest.raises(ConfigError, match="Leave w4a16, w4a8, w3a16 out"):
        proposals(_config(), decoder)


@pytest.mark.parametrize(("key", "value"), [("sparsities", 1.0), ("schemes", "w2a16")])
def test_config_when_a_choice_does_not_exist_is_refused(key: str, value: object) -> None:
    document = {"name": "s", "model": "m", "data": "d", key: [value]}
    with pytest.raises(ConfigError, match=f"`{key}.* = .*{value!r}"):
        parse_config(SearchConfig, document, "test")


def test_layer_groups_when_blocks_do_not_divide_end_with_a_shorter_group() -> None:
    groups = layer_groups(DecoderConfig(num_layers=5), 2)
    assert len(groups) == 6
    assert groups[-1].targets == ("model.layers.4.mlp.*",)
