"""Recipes: ordered steps that turn a dense model into a compressed one.

Takes a model and a recipe; gives the model with every layer's weights replaced by what its
compressed form stands for, and the integers themselves. It does not know how a method works (see
jobs/compression/methods), nor what is written to disk.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from cluster.config import StrictModel, parse_config
from cluster.errors import ConfigError, RecipeError
from jobs.compression import methods
from jobs.compression.methods._protocol import Method
from jobs.config import DecoderConfig, Recipe
from jobs.kernels.formats import Layout, QuantizedWeight, Scheme
from jobs.models import decoder, encoder
from jobs.models.decoder import Decoder
from jobs.models.encoder import Encoder, EncoderConfig
from jobs.plugins import load_plugin

ModelT = TypeVar("ModelT", Decoder, Encoder)
_HEAD = "lm_head"


@dataclass
class Compressed(Generic[ModelT]):
    """A model whose weights are those of its compressed form, with the integers of each layer."""

    model: ModelT
    quantized: dict[str, QuantizedWeight]
    recipe: Recipe

    def scheme_of(self, layer: str) -> Scheme:
        """Return the format of a linear layer, by its name."""
        return self.quantized[layer].scheme if layer in self.quantized else "bf16"


@dataclass(frozen=True)
class _Action:
    number: int
    name: str
    method: Method
    options: StrictModel
    layout: Layout | None
    layers: tuple[str, ...]


def apply_recipe(model: ModelT, recipe: Recipe) -> Compressed[ModelT]:
    """Apply a recipe's steps in order; the model is taken over and changed in place.

    A layer that is quantized twice takes the last choice, computed from its unquantized weight.
    A head that shares the embedding's weight takes a copy of its own if a step names it. Raises
    RecipeError for a target that matches no layer, a group size that does not divide, a method or
    option that does not exist, and pruning after quantizing.
    """
    actions = _resolve(recipe, _linear_shapes(model))
    if isinstance(model, Decoder) and any(_HEAD in action.layers for action in actions):
        model.untie()
    last_layout = _final_layouts(actions)
    quantized: dict[str, QuantizedWeight] = {}
    for action in actions:
        for layer in action.layers:
            is_overruled = action.layout is not None and last_layout.get(layer) is not action
            if is_overruled:
                continue
            weight = _weight(model, layer)
            result = action.method.apply(weight.detach().float(), action.options)
            with torch.no_grad():
                weight.copy_(result.weight_OI)
            if result.quantized is not None:
                quantized[layer] = result.quantized
    return Compressed(model, quantized, recipe)


def layouts(config: DecoderConfig | EncoderConfig, recipe: Recipe) -> dict[str, Layout]:
    """Return the format that each linear layer will have, without touching weights."""
    model = _without_weights(config)
    actions = _resolve(recipe, _linear_shapes(model))
    final = _final_layouts(actions)
    dense = Layout("bf16")
    return {
        name: (final[name].layout or dense) if name in final else dense
        for name in [*_linear_names(model), *([_HEAD] if _HEAD in final else [])]
    }


def predicted_bytes(config: DecoderConfig | EncoderConfig, recipe: Recipe) -> int:
    """Return the bytes of all weight tensors on disk, without touching weights.

    Safetensors headers are not counted; what is not quantized is stored in bfloat16.
    """
    model = _without_weights(config)
    shapes = _linear_shapes(model)
    chosen = layouts(config, recipe)
    if isinstance(model, Decoder) and _HEAD in chosen:
        model.untie()
    # A tied head is the embedding, and parameters() gives it once.
    num_all = sum(parameter.numel() for parameter in model.parameters())
    num_linear = sum(shapes[name][0] * shapes[name][1] for name in chosen)
    linear_bytes = sum(layout.stored_bytes(*shapes[name]) for name, layout in chosen.items())
    return 2 * (num_all - num_linear) + linear_bytes


def _resolve(recipe: Recipe, shapes: dict[str, tuple[int, int]]) -> list[_Action]:
    actions = []
    quantized_by: dict[str, int] = {}
    for number, step in enumerate(recipe.steps, start=1):
        place = f"step {number} ({step.method})"
        try:
            method = cast(Method, load_plugin(methods, step.method, what="compression method"))
            options = parse_config(method.Options, step.options, f"options of {place}")
        except ConfigError as error:
            raise RecipeError(str(error)) from None
        layers = tuple(_matching(step.targets, list(shapes), place))
        layout = method.layout(options)
        for layer in layers:
            if layout is not None:
                _check_groups(layout, layer, shapes[layer], place)
                quantized_by[layer] = number
            elif layer in quantized_by:
                raise RecipeError(
                    f"{place} changes the weights of `{layer}`, which step {quantized_by[layer]} "
                    "has quantized. Put pruning before quantizing."
                )
        actions.append(_Action(number, step.method, method, options, layout, layers))
    return actions


def _final_layouts(actions: list[_Action]) -> dict[str, _Action]:
    return {layer: action for action in actions if action.layout for layer in action.layers}


def _matching(targets: tuple[str, ...], names: list[str], place: str) -> Iterator[str]:
    for target in targets:
        if not any(_is_meant(name, target) for name in names):
            close = difflib.get_close_matches(target, names, n=3) or names[:3]
            raise RecipeError(
                f"{place}: target `{target}` matches no linear layer of this model. "
                f"Close names: {', '.join(close)}. Patterns are globs over such names."
            )
    for name in names:
        if any(_is_meant(name, target) for target in targets):
            yield name


def _is_meant(name: str, target: str) -> bool:
    """Return whether a target reaches a layer: a pattern never reaches the head, its name does."""
    return target == _HEAD if name == _HEAD else fnmatchcase(name, target)


def _check_groups(layout: Layout, layer: str, shape: tuple[int, int], place: str) -> None:
    size, columns = layout.group_size, shape[1]
    if size is not None and columns % size:
        dividing = [s for s in (16, 32, 64, 128, 256) if columns % s == 0]
        hint = f" Sizes that do: {', '.join(map(str, dividing))}." if dividing else ""
        raise RecipeError(
            f"{place}: group_size={size} does not divide the {columns} inputs of `{layer}`.{hint} "
            "Choose another group_size or scheme for it."
        )


def _linear_shapes(model: Decoder | Encoder) -> dict[str, tuple[int, int]]:
    shapes = {}
    head = [_HEAD] if isinstance(model, Decoder) else []
    for name in [*_linear_names(model), *head]:
        rows, columns = _weight(model, name).shape
        shapes[name] = (rows, columns)
    return shapes


def _without_weights(config: DecoderConfig | EncoderConfig) -> Decoder | Encoder:
    with torch.device("meta"):
        return Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)


def _linear_names(model: Decoder | Encoder) -> list[str]:
    family = encoder if isinstance(model, Encoder) else decoder
    return family.linear_names(model)


def _weight(model: nn.Module, layer: str) -> Tensor:
    module = model.get_submodule(layer)
    assert isinstance(module, nn.Linear), f"{layer} is {type(module).__name__}, not a dense layer"
    return module.weight
