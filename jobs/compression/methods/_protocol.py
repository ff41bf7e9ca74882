"""What a compression method offers: options, the format it leads to, and its work on layers.

Adding a method is adding a file beside this one with `Options`, `layout` and one of three
functions, by what it has to see: `apply`, `apply_calibrated` or `scale`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cluster.config import StrictModel
from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._rounding import Observer
from jobs.config import DecoderConfig
from jobs.kernels.formats import Layout, QuantizedWeight
from jobs.models.decoder import Decoder

Feasible = Callable[[Tensor], Tensor]


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
