"""Recipes: ordered steps that turn a dense model into a compressed one.

Takes a model, a recipe and, where a method asks for it, calibration text; gives the model with
every layer's weights replaced by what its compressed form stands for, and the integers themselves.
It does not know how a method works (see jobs/compression/methods), nor what is written to disk.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Generic, TypeVar

from cluster.errors import RecipeError
from jobs.compression.blocks import BlockWork, Progress, go_through
from jobs.compression.calibration import Scratch
from jobs.compression.layer_work import InProcess, LayerWorkers
from jobs.compression.layers import linear_names, shapes_of, without_weights
from jobs.compression.methods._protocol import Repair, RepairMethod, ShapingMethod
from jobs.compression.shared_inputs import HEAD
from jobs.compression.steps import Action, ModelShape, final_layouts, resolve
from jobs.compression.text import CalibrationText, TextNeed, check_needs
from jobs.config import Recipe
from jobs.kernels.formats import Layout, QuantizedWeight, Scheme
from jobs.models.decoder import Decoder
from jobs.models.encoder import Encoder

ModelT = TypeVar("ModelT", Decoder, Encoder)


@dataclass
class Compressed(Generic[ModelT]):
    """A model whose weights are those of its compressed form, with the integers of each layer."""

    model: ModelT
    quantized: dict[str, QuantizedWeight]
    recipe: Recipe

    def scheme_of(self, layer: str) -> Scheme:
        """Return the format of a linear layer, by its name."""
        return self.quantized[layer].scheme if layer in self.quantized else "bf16"


def apply_recipe(
    model: ModelT,
    recipe: Recipe,
    text: CalibrationText | None = None,
    progress: Progress = lambda what, done, total: None,
    workers: LayerWorkers | None = None,
    scratch: Scratch | None = None,
) -> Compressed[ModelT]:
    """Apply a recipe's steps in order; the model is taken over and changed in place.

    Where a method has to see what feeds a layer, the text's tokens go through the model block by
    block: each block's layers take all steps that change layers, up to the next that changes the
    model as a whole, and later blocks see what they make of the text; where the text is not
    `is_sequential`, what the model made of it before these steps. `progress` hears of blocks or
    steps of training done, of how many. A layer that is quantized twice takes the last choice,
    computed from its unquantized weight. A head that shares the embedding's weight takes a copy of
    its own if a step names it. The dense model is kept beside the other up to the last repair.
    `workers` compute what becomes of layers; unset, one after the other in this process. `scratch`
    says where the text's states lie if they are many.
    Raises RecipeError for what `resolve` refuses, a method that needs text where there is none or
    no decoder, and inputs that determine no answer; DataError for less text than a step trains on.
    """
    actions = resolve(recipe, model.config)
    _check_text(actions, has_text=text is not None)
    if text is not None and not text.is_sequential:
        _check_scaled_once(actions)
    work = BlockWork(model, final_layouts(actions), workers or InProcess())
    if not isinstance(model, Decoder):
        work.run(actions, linear_names(model), None)
        return Compressed(model, work.quantized, recipe)
    if needs := _needs(actions):
        assert text is not None, "refused before"
        check_needs(text.split, needs)
    last_repair = max((action.number for action in actions if _is_repair(action)), default=0)
    teacher = copy.deepcopy(model) if last_repair else None
    if any(HEAD in action.layers for action in actions if not action.is_of_model):
        model.untie()
    for is_of_model, run in groupby(actions, key=lambda action: action.is_of_model):
        if not is_of_model:
            go_through(list(run), work, text, progress, scratch)
            continue
        assert text is not None, "refused before"
        text = replace(text, cache=None)  # Only the unchanged model is other recipes' as well.
        for action in run:
            if teacher is not None and _is_repair(action):
                _repair(work, action, teacher, text, progress)
                teacher = None if action.number == last_repair else teacher
            else:
                _reshape(model, action, text)
    return Compressed(model, work.quantized, recipe)


def needs_text(shape: ModelShape, recipe: Recipe, *, has_text: bool) -> bool:
    """Return whether a step has to see text, without touching weights.

    Raises RecipeError for whatever `apply_recipe` would refuse before it computes.
    """
    actions = resolve(recipe, shape)
    _check_text(actions, has_text=has_text)
    return any(action.needs_text for action in actions)


def text_needs(shape: ModelShape, recipe: Recipe) -> dict[str, TextNeed]:
    """Return the steps that train, as messages call them, and how much text each takes."""
    return _needs(resolve(recipe, shape))


def final_shape(shape: ModelShape, recipe: Recipe) -> ModelShape:
    """Return the configuration that the model will have, without touching weights."""
    actions = resolve(recipe, shape)
    return actions[-1].shape if actions else shape


def layouts(shape: ModelShape, recipe: Recipe) -> dict[str, Layout]:
    """Return the format that each linear layer will have, without touching weights."""
    final = final_layouts(resolve(recipe, shape))
    names = linear_names(without_weights(final_shape(shape, recipe)))
    dense = Layout("bf16")
    return {
        name: (final[name].layout or dense) if name in final else dense
        for name in [*names, *([HEAD] if HEAD in final else [])]
    }


def predicted_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Return the bytes of all weight tensors on disk, without touching weights.

    Safetensors headers are not counted; what is not quantized is stored in bfloat16.
    """
    model = without_weights(final_shape(shape, recipe))
    shapes = shapes_of(model)
    chosen = layouts(shape, recipe)
    if isinstance(model, Decoder) and HEAD in chosen:
        model.untie()
    # A tied head is the embedding, and parameters() gives it once.
    num_all = sum(parameter.numel() for parameter in model.parameters())
    num_linear = sum(shapes[name][0] * shapes[name][1] for name in chosen)
    linear_bytes = sum(layout.stored_bytes(*shapes[name]) for name, layout in chosen.items())
    return 2 * (num_all - num_linear) + linear_bytes


def _check_text(actions: Sequence[Action], *, has_text: bool) -> None:
    for action in actions:
        if action.needs_text and not has_text:
            others = "" if action.is_of_model else ", or use rtn or magnitude"
            raise RecipeError(
                f"{action.place} cannot be applied: it has to see text. Give `calibration`{others}."
            )


def _check_scaled_once(actions: Sequence[Action]) -> None:
    """Raise RecipeError for a second scaling: it has to see the model that the first one made."""
    scaling = [action for action in actions if action.is_scaling]
    if len(scaling) > 1:
        raise RecipeError(
            f"{scaling[1].place} would see the inputs that layers had before {scaling[0].place}. "
            "Leave one of them out, or set `sequential: true` in `calibration`."
        )


def _needs(actions: Sequence[Action]) -> dict[str, TextNeed]:
    return {
        action.place: action.method.text_need(action.options)
        for action in actions
        if isinstance(action.method, RepairMethod)
    }


def _is_repair(action: Action) -> bool:
    return isinstance(action.method, RepairMethod)


def _reshape(model: Decoder, action: Action, text: CalibrationText) -> None:
    assert isinstance(action.method, ShapingMethod), f"{action.name} does not cut models"
    action.method.cut(model, text.tokens_NT, action.options)
    assert model.config == action.shape.replace(tie_embeddings=model.config.tie_embeddings), (
        f"{action.place} made another shape than it said"
    )


def _repair(
    work: BlockWork, action: Action, teacher: Decoder, text: CalibrationText, progress: Progress
) -> None:
    assert isinstance(action.method, RepairMethod), f"{action.name} does not repair models"
    assert isinstance(work.model, Decoder), "refused before"
    task = Repair(work.model, teacher, text, work.pruned_names())
    try:
        action.method.repair(
            task,
            action.options,
            lambda done, total, loss: progress(f"{action.place}, loss {loss:.4g}", done, total),
        )
    except RecipeError as error:
        raise RecipeError(f"{action.place}: {error.message}") from None
