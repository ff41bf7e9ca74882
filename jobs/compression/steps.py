"""A recipe's steps, checked against a model's shape before any weight is touched.

Takes a recipe and a model's configuration; gives actions: which method with which options on which
layers, and the configuration after each. It does not know how a method works, nor when its turn
comes.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from cluster.config import StrictModel, parse_config
from cluster.errors import ConfigError, RecipeError
from jobs.compression import methods
from jobs.compression.layers import Shapes, linear_shapes
from jobs.compression.methods._protocol import (
    CalibratedMethod,
    Method,
    RepairMethod,
    ScalingMethod,
    ShapingMethod,
    WeightMethod,
)
from jobs.compression.methods._sparsity import SparsityOptions
from jobs.compression.shared_inputs import HEAD, group_of
from jobs.config import DecoderConfig, Recipe, Step
from jobs.kernels.formats import Layout
from jobs.models.encoder import EncoderConfig
from jobs.plugins import load_plugin

ModelShape = DecoderConfig | EncoderConfig
_ALL = ("*",)


@dataclass(frozen=True)
class Action:
    """One step, resolved; `shape` is the model's after it."""

    number: int
    name: str
    method: Method
    options: StrictModel
    layout: Layout | None
    layers: tuple[str, ...]
    shape: ModelShape

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"step {self.number} ({self.name})"

    @property
    def needs_text(self) -> bool:
        """Whether the method has to see text."""
        return self.is_of_model or isinstance(self.method, CalibratedMethod | ScalingMethod)

    @property
    def is_of_model(self) -> bool:
        """Whether it changes the model as a whole, not one layer after another."""
        return isinstance(self.method, ShapingMethod | RepairMethod)

    @property
    def is_scaling(self) -> bool:
        """Whether it scales what layers share, so that they depend on each other."""
        return isinstance(self.method, ScalingMethod)

    @property
    def is_pruning(self) -> bool:
        """Whether it zeroes weights of its layers, and nothing else."""
        return self.layout is None and isinstance(self.method, WeightMethod | CalibratedMethod)


def resolve(recipe: Recipe, shape: ModelShape) -> list[Action]:
    """Return the actions of a recipe on a model of this shape.

    Raises RecipeError for a target that matches no layer, a group size that does not divide, a
    method or option that does not exist or is not for this family, a change of weights that are
    quantized already, scaling for a format that no later step gives or before a change of shape, a
    pattern that does not divide, and a `kv_cache` for an encoder.
    """
    if recipe.kv_cache != "auto" and not isinstance(shape, DecoderConfig):
        raise RecipeError(
            f"`kv_cache` = {recipe.kv_cache}: an encoder keeps no keys and values of former "
            "tokens. Leave it out."
        )
    actions: list[Action] = []
    quantized_by: dict[str, int] = {}
    shapes = linear_shapes(shape)
    for number, step in enumerate(recipe.steps, start=1):
        action = _action(number, step, shape, shapes)
        if action.needs_text and not isinstance(shape, DecoderConfig):
            raise RecipeError(
                f"{action.place} cannot be applied: it has to see text in the blocks of a decoder, "
                "and this model is an encoder. Use rtn or magnitude."
            )
        if action.shape != shape:
            shape, shapes = action.shape, linear_shapes(action.shape)
        for layer in _changed_layers(action):
            if action.layout is None and layer in quantized_by:
                raise RecipeError(
                    f"{action.place} changes the weights of `{layer}`, which step "
                    f"{quantized_by[layer]} has quantized. Put pruning and scaling before "
                    "quantizing."
                )
        _check_pattern(action, shapes)
        actions.append(action)
        if action.layout is None:
            continue
        for layer in action.layers:
            _check_groups(action.layout, layer, shapes[layer], action.place)
            if action.layout.scheme == "bf16":
                quantized_by.pop(layer, None)
            else:
                quantized_by[layer] = number
    _check_scaling(actions)
    return actions


def final_layouts(actions: Sequence[Action]) -> dict[str, Action]:
    """Return the action that decides each layer's format."""
    return {layer: action for action in actions if action.layout for layer in action.layers}


def _action(number: int, step: Step, shape: ModelShape, shapes: Shapes) -> Action:
    place = f"step {number} ({step.method})"
    try:
        method = cast(Method, load_plugin(methods, step.method, what="compression method"))
        parsed = parse_config(method.Options, dict(step.options), f"options of {place}")
    except ConfigError as error:
        raise RecipeError(str(error)) from None
    layers = tuple(_matching(step.targets, list(shapes), place))
    if isinstance(method, ShapingMethod | RepairMethod) and isinstance(shape, DecoderConfig):
        shape = _checked_whole(method, parsed, step, shape, place)
    return Action(number, step.method, method, parsed, method.layout(parsed), layers, shape)


def _checked_whole(
    method: ShapingMethod | RepairMethod,
    options: StrictModel,
    step: Step,
    shape: DecoderConfig,
    place: str,
) -> DecoderConfig:
    """Return the shape after a step that changes a model as a whole."""
    if step.targets != _ALL:
        raise RecipeError(
            f"{place}: it changes the model as a whole. Leave `targets` out; its options say all."
        )
    if isinstance(method, RepairMethod):
        seq_len = method.text_need(options).seq_len
        if seq_len > shape.max_seq_len:
            raise RecipeError(
                f"{place}: seq_len={seq_len} exceeds the model's {shape.max_seq_len} positions. "
                "Lower it."
            )
        return shape
    try:
        return method.reshape(shape, options)
    except RecipeError as error:
        raise RecipeError(f"{place}: {error.message}") from None


def _changed_layers(action: Action) -> Iterator[str]:
    """Give the layers whose weights an action changes: scaling reaches those around its own."""
    if not isinstance(action.method, ScalingMethod):
        yield from action.layers
        if action.is_of_model:
            yield HEAD
        return
    for layer in action.layers:
        group = None if layer == HEAD else group_of(layer)
        if group is None:
            raise RecipeError(
                f"{action.place}: nothing can scale the input of `{layer}`. Take it out of "
                "`targets`; scaling is for linear layers of a decoder's blocks."
            )
        yield from group.layers
        yield group.producer


def _check_scaling(actions: Sequence[Action]) -> None:
    final = final_layouts(actions)
    for action in actions:
        if not isinstance(action.method, ScalingMethod):
            continue
        for later in actions[action.number :]:
            if isinstance(later.method, ShapingMethod):
                raise RecipeError(
                    f"{action.place} scales layers that {later.place} cuts before they are "
                    "quantized. Put depth/width before awq/smoothquant."
                )
        for layer in action.layers:
            decided = final.get(layer)
            if decided is None or decided.number < action.number:
                raise RecipeError(
                    f"{action.place} prepares `{layer}` for a format that no later step gives it. "
                    "Add a step that quantizes it, such as rtn or gptq."
                )


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
    return target == HEAD if name == HEAD else fnmatchcase(name, target)


def _check_pattern(action: Action, shapes: Shapes) -> None:
    options = action.options
    if not isinstance(options, SparsityOptions) or options.kept_of is None:
        return
    for layer in action.layers:
        columns = shapes[layer][1]
        if columns % options.kept_of[1]:
            raise RecipeError(
                f"{action.place}: pattern={options.pattern} does not divide the {columns} inputs "
                f"of `{layer}`. Choose another pattern, or `sparsity`."
            )


def _check_groups(layout: Layout, layer: str, shape: tuple[int, int], place: str) -> None:
    size, columns = layout.group_size, shape[1]
    if size is not None and columns % size:
        dividing = [s for s in (16, 32, 64, 128, 256) if columns % s == 0]
        hint = f" Sizes that do: {', '.join(map(str, dividing))}." if dividing else ""
        raise RecipeError(
            f"{place}: group_size={size} does not divide the {columns} inputs of `{layer}`.{hint} "
            "Choose another group_size or scheme for it."
        )
