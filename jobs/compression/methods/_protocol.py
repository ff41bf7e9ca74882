"""What a compression method offers: options, the format it leads to, and its work on layers.

Adding a method is adding a file beside this one with `Options`, `layout` and one of five
functions, by what it has to see and change: `apply`, `apply_calibrated`, `scale`, `cut`, `repair`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cluster.config import StrictModel
from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._rounding import Observer
from jobs.compression.text import CalibrationText, TextNeed
from jobs.config import DecoderConfig
from jobs.kernels.formats import Layout, QuantizedWeight
from jobs.models.decoder import Decoder

Feasible = Callable[[Tensor], Tensor]
# Steps done, of how many, and the loss of the last one.
RepairProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class LayerResult:
    """What a method made of one layer: its weight, and the integers if it is quantized."""

    weight_OI: Tensor  # noqa: N815
    quantized: QuantizedWeight | None = None


@dataclass(frozen=True)
class Quantizable:
    """A layer whose input may be scaled, and how a later step of the recipe rounds it.

    `effect_O`, where the method asks for it, is how much a change of each output changes the
    block's output: the mean over tokens of the squared derivative.
    """

    weight_OI: Tensor  # noqa: N815
    layout: Layout
    observer: Observer = "minmax"
    effect_O: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Repair:
    """A decoder to train in place, and the dense one it came from, before any step changed it.

    Zeros in the weights of `pruned` layers, by name, stay zero.
    """

    student: Decoder
    teacher: Decoder
    text: CalibrationText
    pruned: frozenset[str] = frozenset()


@runtime_checkable
class Method(Protocol):
    """A plug-in: `Options`, `layout(options)`, and one of the functions below.

    `layout` is the format a layer has afterwards, or None if the method leaves it as it is. Methods
    take float32 weights and never change them in place.
    """

    Options: type[StrictModel]
    layout: Callable[[Any], Layout | None]


@runtime_checkable
class WeightMethod(Method, Protocol):
    """Sees one weight alone: `apply(weight_OI, options)`."""

    apply: Callable[[Tensor, Any], LayerResult]


@runtime_checkable
class CalibratedMethod(Method, Protocol):
    """Sees what text feeds the layer, too: `apply_calibrated(weight_OI, inputs, options)`.

    Raises RecipeError where the inputs do not determine an answer; the caller names the layer.
    """

    apply_calibrated: Callable[[Tensor, LayerInputs, Any], LayerResult]


@runtime_checkable
class ScalingMethod(Method, Protocol):
    """Finds factors scale_I by which layers that share an input divide it, to round better.

    `scale(layers, inputs, feasible, options)`: `feasible` turns factors into the nearest that what
    makes the input can carry out, and those are what is returned. The model computes the same:
    weights take the factors, what makes the input is divided by them. `needs_effects` says whether
    the layers come with `effect_O`.
    """

    scale: Callable[[Sequence[Quantizable], LayerInputs, Feasible, Any], Tensor]
    needs_effects: bool


@runtime_checkable
class ShapingMethod(Method, Protocol):
    """Cuts a decoder to a smaller shape.

    `reshape(config, options)` returns that shape and raises RecipeError where there is none;
    `cut(model, text_NT, options)` gives it to a model, in place.
    """

    reshape: Callable[[DecoderConfig, Any], DecoderConfig]
    cut: Callable[[Decoder, Tensor, Any], None]


@runtime_checkable
class RepairMethod(Method, Protocol):
    """Trains a decoder that earlier steps made worse.

    `text_need(options)` returns how much text that takes, so that the plan refuses too little;
    `repair(task, options, progress)` trains the student in place, and raises RecipeError where
    that fails.
    """

    text_need: Callable[[Any], TextNeed]
    repair: Callable[[Repair, Any, RepairProgress], None]
