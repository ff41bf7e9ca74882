"""Recipes: ordered steps that turn a dense model into a compressed one.

Takes a model, a recipe and, where a method asks for it, calibration text; gives the model with
every layer's weights replaced by what its compressed form stands for, and the integers themselves.
It does not know how a method works (see jobs/compression/methods), nor what is written to disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

import torch
from torch import Tensor

from cluster.errors import RecipeError
from jobs.compression.calibration import CalibrationPass
from jobs.compression.inputs import LayerInputs
from jobs.compression.layers import linear_names, shapes_of, weight_of, without_weights
from jobs.compression.methods._protocol import (
    CalibratedMethod,
    LayerResult,
    Quantizable,
    ScalingMethod,
    ShapingMethod,
    WeightMethod,
)
from jobs.compression.methods._rounding import RoundingOptions
from jobs.compression.shared_inputs import (
    HEAD,
    SharedInput,
    divide_input,
    feasible_scale,
    group_of,
    shared_inputs,
)
from jobs.compression.steps import Action, ModelShape, final_layouts, resolve
from jobs.config import DecoderConfig, Recipe
from jobs.kernels.formats import Layout, QuantizedWeight, Scheme
from jobs.models.decoder import Decoder
from jobs.models.encoder import Encoder

ModelT = TypeVar("ModelT", Decoder, Encoder)
Progress = Callable[[int, int], None]


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
    text_NT: Tensor | None = None,
    progress: Progress = lambda done, total: None,
) -> Compressed[ModelT]:
    """Apply a recipe's steps in order; the model is taken over and changed in place.

    Where a method has to see what text feeds a layer, `text_NT` (token ids) goes through the model
    once: block by block, each block's layers take all steps, and later blocks see what they make of
    the text. `progress` hears of blocks done, of how many. A layer that is quantized twice takes
    the last choice, computed from its unquantized weight. A head that shares the embedding's weight
    takes a copy of its own if a step names it. Raises RecipeError for what `resolve` refuses, a
    method that needs text where there is none or no decoder, and inputs that determine no answer.
    """
    actions = resolve(recipe, model.config)
    _check_text(actions, model.config, has_text=text_NT is not None)
    final = final_layouts(actions)
    if not isinstance(model, Decoder):
        work = _Work(model, final)
        work.run(actions, linear_names(model), None)
        return Compressed(model, work.quantized, recipe)
    if any(HEAD in action.layers for action in actions if not action.is_of_model):
        model.untie()
    quantized: dict[str, QuantizedWeight] = {}
    for is_of_model, run in groupby(actions, key=lambda action: action.is_of_model):
        if is_of_model:
            for action in run:
                _reshape(model, action, text_NT)
        else:
            work = _Work(model, final)
            _go_through(model, list(run), work, text_NT, progress)
            quantized |= work.quantized
    return Compressed(model, quantized, recipe)


def needs_text(shape: ModelShape, recipe: Recipe, *, has_text: bool) -> bool:
    """Return whether a step has to see text, without touching weights.

    Raises RecipeError for whatever `apply_recipe` would refuse before it computes.
    """
    actions = resolve(recipe, shape)
    _check_text(actions, shape, has_text=has_text)
    return any(action.needs_text for action in actions)


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


def _check_text(actions: Sequence[Action], shape: ModelShape, *, has_text: bool) -> None:
    why = None
    if not isinstance(shape, DecoderConfig):
        why = "the model is an encoder, and it knows the blocks of decoders. Use rtn"
    elif not has_text:
        why = "it has to see text. Give `calibration`, or use rtn or magnitude"
    for action in actions:
        if action.needs_text and why is not None:
            raise RecipeError(f"{action.place} cannot be applied: {why}.")


def _reshape(model: Decoder, action: Action, text_NT: Tensor | None) -> None:
    assert isinstance(action.method, ShapingMethod), f"{action.name} does not cut models"
    assert text_NT is not None, "refused before"
    action.method.cut(model, text_NT, action.options)
    assert model.config == action.shape.replace(tie_embeddings=model.config.tie_embeddings), (
        f"{action.place} made another shape than it said"
    )


def _go_through(
    model: Decoder,
    actions: Sequence[Action],
    work: "_Work",
    text_NT: Tensor | None,
    progress: Progress,
) -> None:
    """Apply all actions to one block after another, then to the head."""
    num_blocks = len(model.model.layers)
    parts = [
        [name for g in shared_inputs(block) for name in g.layers] for block in range(num_blocks)
    ]
    parts.append([HEAD])
    seeing = {layer for action in actions if action.needs_text for layer in action.layers}
    last_seeing = max((n for n, part in enumerate(parts) if seeing.intersection(part)), default=-1)
    if last_seeing < 0:
        for part in parts:
            work.run(actions, part, None)
        return
    assert text_NT is not None, "refused before"
    with CalibrationPass(model, text_NT) as text:
        for number, part in enumerate(parts):
            work.run(actions, part, text)
            if number < last_seeing:
                text.advance()
            progress(number + 1, len(parts))


@dataclass
class _Work:
    """A model under way."""

    model: Decoder | Encoder
    final: dict[str, Action]
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    effects: dict[str, Tensor] = field(default_factory=dict)

    def run(
        self, actions: Sequence[Action], part: Sequence[str], text: CalibrationPass | None
    ) -> None:
        """Apply all actions to some layers, in order, with what the text feeds them now."""
        here = [(action, [layer for layer in action.layers if layer in part]) for action in actions]
        seeing = [layer for action, layers in here if action.needs_text for layer in layers]
        groups = {layer: group_of(layer) for layer in seeing}
        firsts = {layer: group.layers[0] if group else layer for layer, group in groups.items()}
        inputs: dict[str, LayerInputs] = {}
        self.effects = {}
        if firsts:
            assert text is not None, "refused before"
            inputs = text.observe(list(dict.fromkeys(firsts.values())))
            asking = [layer for action, layers in here if _asks(action) for layer in layers]
            self.effects = text.effects(list(dict.fromkeys(asking))) if asking else {}
        for action, layers in here:
            if isinstance(action.method, ScalingMethod):
                for group in dict.fromkeys(groups[layer] for layer in layers):
                    assert group is not None, "checked when resolved"
                    first = group.layers[0]
                    inputs[first] = self._scale(action, group, layers, inputs[first])
                continue
            for layer in layers:
                self._change(action, layer, inputs.get(firsts.get(layer, layer)))

    def _scale(
        self, action: Action, group: SharedInput, layers: Sequence[str], inputs: LayerInputs
    ) -> LayerInputs:
        """Scale the input of a group; return its moments afterwards."""
        assert isinstance(action.method, ScalingMethod), action
        assert isinstance(self.model, Decoder), "refused before"
        rounded = [self._rounded(name, self.final[name]) for name in group.layers if name in layers]
        rounded = [layer for layer in rounded if layer.layout.scheme != "bf16"]
        if not rounded:
            return inputs
        feasible = partial(feasible_scale, self.model, group)
        scale_I = action.method.scale(rounded, inputs, feasible, action.options)
        divide_input(self.model, group, scale_I)
        return inputs.divided_by(scale_I)

    def _rounded(self, layer: str, action: Action) -> Quantizable:
        """Return a layer as the action that decides its format will round it."""
        assert action.layout is not None, "checked when resolved"
        assert isinstance(action.options, RoundingOptions), f"{action.name} does not round"
        weight_OI = weight_of(self.model, layer).detach().float()
        return Quantizable(
            weight_OI, action.layout, action.options.observer, self.effects.get(layer)
        )

    def _change(self, action: Action, layer: str, inputs: LayerInputs | None) -> None:
        if action.layout is not None and self.final[layer] is not action:
            return  # A later step decides.
        weight = weight_of(self.model, layer)
        result = _result(action, layer, weight.detach().float(), inputs)
        with torch.no_grad():
            weight.copy_(result.weight_OI)
        if result.quantized is not None:
            self.quantized[layer] = result.quantized


def _asks(action: Action) -> bool:
    return isinstance(action.method, ScalingMethod) and action.method.needs_effects


def _result(
    action: Action, layer: str, weight_OI: Tensor, inputs: LayerInputs | None
) -> LayerResult:
    try:
        if isinstance(action.method, CalibratedMethod):
            assert inputs is not None, f"{layer} was not observed"
            return action.method.apply_calibrated(weight_OI, inputs, action.options)
        assert isinstance(action.method, WeightMethod), f"{action.name} offers no function"
        return action.method.apply(weight_OI, action.options)
    except RecipeError as error:
        raise RecipeError(f"{action.place}, `{layer}`: {error.message}") from None
