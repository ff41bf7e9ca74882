import pytest
import torch
from search_fakes import DECODER, space

from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe
from jobs.models.decoder import build
from jobs.search.probe import divergences

TOKENS = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))


def _plain(recipe: Recipe) -> float:
    with torch.inference_mode():
        wanted = build(DECODER, seed=1)(TOKENS).log_softmax(dim=-1)
        found = apply_recipe(build(DECODER, seed=1), recipe).model(TOKENS).log_softmax(dim=-1)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


def test_divergences_when_measured_from_a_later_block_equal_those_of_whole_passes() -> None:
    of = space(schemes=("bf16", "w8a8", "w3a16"), granularity="fused", layers_per_group=1)
    model = build(DECODER, seed=1)
    for group in (0, 9):  # choices in order: bf16, w3a16, w8a8
        recipes = [of.alone(group, choice) for choice in range(3)]
        found = divergences(model, recipes, of.groups[group].first, TOKENS)
        assert found[0] == 0.0
        assert found[1:] == pytest.approx([_plain(recipe) for recipe in recipes[1:]], rel=1e-2)
        assert found[1] > 10 * found[2] > 0.0  # int3 and int8


def test_divergences_when_done_leave_the_model_as_it_was() -> None:
    of = space(schemes=("w3a16",))
    model, before = build(DECODER, seed=1), build(DECODER, seed=1)
    divergences(model, [of.alone(1, 0)], of.groups[1].first, TOKENS)
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then), name
