"""What recipes' steps do to one layer by itself, and the seam to whoever computes it.

Takes a layer's weight, its steps in order and its inputs' moments; gives what the steps make of it.
Layers of a block do not depend on each other once their inputs were observed, so several may be
computed at a time, also in other processes. It knows neither models nor Ray.

O output features, I input features
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.config import StrictModel
from cluster.errors import RecipeError
from jobs.compression import methods
from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._protocol import CalibratedMethod, LayerResult, WeightMethod
from jobs.plugins import load_plugin


@dataclass(frozen=True)
class LayerStep:
    """One method with its options, and what messages call the step."""

    place: str
    method: str
    options: StrictModel


@dataclass(frozen=True)
class LayerTask:
    """A layer's weight and its steps; `reads` names the inputs it shares with others, if any."""

    layer: str
    weight_OI: Tensor  # noqa: N815
    steps: tuple[LayerStep, ...]
    reads: str | None


class LayerWorkers(Protocol):
    """Who computes layers."""

    def run(
        self, tasks: Sequence[LayerTask], inputs: Mapping[str, LayerInputs]
    ) -> Iterator[LayerResult]:
        """Give what `change_layer` makes of each task, in their order, with the inputs it reads."""
        ...


class InProcess:
    """One layer after the other, here."""

    def run(
        self, tasks: Sequence[LayerTask], inputs: Mapping[str, LayerInputs]
    ) -> Iterator[LayerResult]:
        """Compute each result when it is asked for."""
        for task in tasks:
            yield change_layer(task, None if task.reads is None else inputs[task.reads])


def change_layer(task: LayerTask, inputs: LayerInputs | None) -> LayerResult:
    """Return the weight, in its own dtype, and the integers after all steps.

    Raises RecipeError, naming step and layer, where the inputs determine no answer.
    """
    weight_OI, quantized = task.weight_OI, None
    for step in task.steps:
        result = _apply(step, task.layer, weight_OI.float(), inputs)
        weight_OI = result.weight_OI.to(weight_OI.dtype)
        quantized = result.quantized or quantized
    return LayerResult(weight_OI, quantized)


def _apply(
    step: LayerStep, layer: str, weight_OI: Tensor, inputs: LayerInputs | None
) -> LayerResult:
    method = load_plugin(methods, step.method, what="compression method")
    try:
        if isinstance(method, CalibratedMethod):
            assert inputs is not None, f"{layer} was not observed"
            return method.apply_calibrated(weight_OI, inputs, step.options)
        assert isinstance(method, WeightMethod), f"{step.method} offers no function"
        return method.apply(weight_OI, step.options)
    except RecipeError as error:
        raise RecipeError(f"{step.place}, `{layer}`: {error.message}") from None
