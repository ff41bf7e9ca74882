"""How far each choice of one group of layers, alone, moves a model's predictions.

Takes a dense decoder, recipes that change only layers from some block on, and token ids; gives the
mean divergence of the changed model's predictions from the unchanged one's. The model comes back as
it was. It does not know groups or searches.

The divergence (Kullback and Leibler 1951) is what the loss rises by on text that the unchanged
model would write itself; it is never negative and varies less from text to text than the loss.

B sequences, T tokens, C hidden width, N = B * T, V vocabulary
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.nn import functional

from jobs.compression.layers import linear_names, weight_of
from jobs.compression.recipe import apply_recipe
from jobs.config import Recipe
from jobs.models.decoder import Decoder

_LOGITS_AT_ONCE = 2**24


@torch.inference_mode()
def divergences(
    model: Decoder, recipes: Sequence[Recipe], first_block: int, tokens_BT: Tensor
) -> tuple[float, ...]:
    """Return the mean divergence under each recipe, in nats per token; 0 where nothing changes.

    Recipes must change linear layers of the blocks from `first_block` on, and no others. What
    comes before is computed once.
    """
    layers = list(model.model.layers)
    rotation = model.rotary(torch.arange(tokens_BT.shape[1])[None], torch.float32)
    h_BTC = model.model.embed_tokens(tokens_BT)
    for block in layers[:first_block]:
        h_BTC = block(h_BTC, *rotation)

    def through(start_BTC: Tensor) -> Tensor:
        for block in layers[first_block:]:
            start_BTC = block(start_BTC, *rotation)
        return model.model.norm(start_BTC).flatten(0, 1)

    unchanged_NC = through(h_BTC)
    targets = {target for recipe in recipes for step in recipe.steps for target in step.targets}
    kept = {
        name: weight_of(model, name)
        for name in linear_names(model)
        if any(fnmatchcase(name, target) for target in targets)
    }
    saved = {name: weight.clone() for name, weight in kept.items()}
    changed: dict[int, Tensor] = {}
    for number, recipe in enumerate(recipes):
        if not recipe.steps:
            continue
        apply_recipe(model, recipe)
        changed[number] = through(h_BTC)
        for name, weight in saved.items():
            kept[name].copy_(weight)
    measured = dict(
        zip(changed, _divergences(model, unchanged_NC, [*changed.values()]), strict=True)
    )
    return tuple(measured.get(number, 0.0) for number in range(len(recipes)))


def _divergences(model: Decoder, expected_NC: Tensor, found: Sequence[Tensor]) -> list[float]:
    """Return the mean divergence of what each of some states predicts from what is expected."""
    totals = [0.0] * len(found)
    rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(expected_NC), rows):
        part = slice(start, start + rows)
        wanted_NV = functional.log_softmax(model.head(expected_NC[part]).float(), dim=-1)
        shares_NV = wanted_NV.exp()
        for place, found_NC in enumerate(found):
            given_NV = functional.log_softmax(model.head(found_NC[part]).float(), dim=-1)
            divergence_N = (shares_NV * (wanted_NV - given_NV)).sum(dim=-1)
            totals[place] += float(divergence_N.double().sum())
    return [total / len(expected_NC) for total in totals]
