"""AWQ-style scaling: enlarge the weights of large inputs, so that rounding hurts them less.

Takes the weights of layers that share an input, and its moments; gives the factors by which the
input is divided: of a grid, those that leave the least squared error of the layers' outputs after
rounding to the format they are given later. A later step quantizes the layers.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", 2023, section 3.2. There the error is that of the whole attention or MLP, run
anew for every factor; here it is that to first order: errors of the layers' outputs, each weighed
by how much it changes what the block gives.
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from cluster.config import StrictModel
from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._protocol import Feasible, Quantizable
from jobs.compression.methods._rounding import Observer, find_scale
from jobs.kernels.formats import Layout, round_to_scale

_LEAST = 1e-4
needs_effects = True


class Options(StrictModel):
    """How many factors are tried, and how scales are chosen on trial."""

    num_ratios: int = Field(20, ge=1, description="Steps of the grid between none and all.")
    observer: Observer | None = Field(
        None,
        description="How a scale of weights is chosen on trial; unset: as the step that rounds.",
    )


def layout(options: Options) -> Layout | None:
    """Return None: a later step quantizes."""
    return None


def scale(
    layers: Sequence[Quantizable], inputs: LayerInputs, feasible: Feasible, options: Options
) -> Tensor:
    """Return the scale_I of the least error; ones where no other is better."""
    best_I = torch.ones_like(inputs.mean_abs_I)
    least = _error(layers, inputs, best_I, options.observer)
    for scale_I in map(feasible, _candidates(layers, inputs, options.num_ratios)):
        error = _error(layers, inputs, scale_I, options.observer)
        if error < least:
            best_I, least = scale_I, error
    return best_I


def _candidates(
    layers: Sequence[Quantizable], inputs: LayerInputs, num_ratios: int
) -> Iterator[Tensor]:
    """Give powers of the inputs' mean size, and those over powers of the weights'."""
    sizes_I = inputs.mean_abs_I.clamp_min(_LEAST)
    weights_I = _weight_sizes(layers).clamp_min(_LEAST)
    for step in range(1, num_ratios + 1):
        ratio = step / num_ratios
        for scale_I in (sizes_I**ratio, sizes_I**ratio / weights_I ** (1 - ratio)):
            scale_I = scale_I.clamp_min(_LEAST)
            yield scale_I / (scale_I.max() * scale_I.min()).sqrt()


def _weight_sizes(layers: Sequence[Quantizable]) -> Tensor:
    """Return the mean over outputs of weights as shares of their group's largest: [I]."""
    shares = []
    for layer in layers:
        groups = layer.layout.num_groups(layer.weight_OI.shape[1])
        size_OGS = layer.weight_OI.abs().unflatten(1, (groups, -1))
        largest_OG1 = size_OGS.amax(dim=-1, keepdim=True).clamp_min(1e-12)
        shares.append((size_OGS / largest_OG1).flatten(1))
    return torch.cat(shares).mean(dim=0)


def _error(
    layers: Sequence[Quantizable],
    inputs: LayerInputs,
    scale_I: Tensor,
    observer: Observer | None,
) -> float:
    total = 0.0
    for layer in layers:
        scaled_OI = layer.weight_OI * scale_I
        scale_OG = find_scale(scaled_OI, layer.layout, observer or layer.observer)
        rounded_OI = round_to_scale(scaled_OI, scale_OG, layer.layout).dequantize()
        total += float(inputs.squared_error(rounded_OI / scale_I - layer.weight_OI, layer.effect_O))
    return total
