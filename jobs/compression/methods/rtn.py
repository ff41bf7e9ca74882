"""Round to nearest: the weight decides alone, no data is seen.

Takes one dense weight; gives values of few bits at a scale per output channel (w8a8, fp8) or per
group of inputs (w4a16, w4a8). The scale is the largest weight's (`minmax`), or that clipped by the
ratio, out of a grid, that leaves the least squared error in the channel or group (`mse`).
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cluster.config import StrictModel
from jobs.compression.methods._protocol import LayerResult
from jobs.kernels.formats import (
    DEFAULT_GROUP_SIZE,
    GROUPED,
    Layout,
    Scheme,
    round_scale,
    round_to_scale,
    round_values_,
    value_range,
)

_GRID = tuple(1.0 - 0.02 * step for step in range(26))


class Options(StrictModel):
    """Into which format, and how scales are chosen."""

    scheme: Scheme = Field("w8a8", description="bf16 (leave dense), w8a8, fp8, w4a16 or w4a8.")
    group_size: int = Field(
        DEFAULT_GROUP_SIZE, ge=16, description="int4: inputs that share a scale; a power of 2."
    )
    observer: Literal["minmax", "mse"] = Field("mse", description="How a scale is chosen.")

    @model_validator(mode="after")
    def _check_group_size(self) -> Self:
        if self.group_size & (self.group_size - 1):
            raise ValueError(f"group_size={self.group_size} is not a power of 2")
        return self


def layout(options: Options) -> Layout | None:
    """Return the format these options choose."""
    is_grouped = options.scheme in GROUPED
    return Layout(options.scheme, options.group_size if is_grouped else None)


def apply(weight_OI: Tensor, options: Options) -> LayerResult:
    """Quantize one weight, or round it to bfloat16 for the scheme `bf16`."""
    chosen = layout(options)
    if chosen is None or chosen.scheme == "bf16":
        return LayerResult(weight_OI.to(torch.bfloat16).to(weight_OI.dtype))
    scale_OG = _largest_scale(weight_OI, chosen)
    if options.observer == "mse":
        scale_OG = _best_scale(weight_OI, scale_OG, chosen)
    quantized = round_to_scale(weight_OI, scale_OG, chosen)
    return LayerResult(quantized.dequantize(weight_OI.dtype), quantized)


def _largest_scale(weight_OI: Tensor, chosen: Layout) -> Tensor:
    groups = chosen.num_groups(weight_OI.shape[1])
    _, high = value_range(chosen.scheme)
    return weight_OI.float().unflatten(1, (groups, -1)).abs().amax(dim=-1) / high


def _best_scale(weight_OI: Tensor, largest_OG: Tensor, chosen: Layout) -> Tensor:
    """Return the scale on the grid below the largest that leaves the least squared error."""
    weight_OGS = weight_OI.float().unflatten(1, (largest_OG.shape[1], -1))
    best_OG = largest_OG
    least_OG = torch.full_like(largest_OG, torch.inf)
    for ratio in _GRID:
        scale_OG = round_scale(largest_OG * ratio)
        step_OG1 = scale_OG[:, :, None]
        rounded_OGS = round_values_(weight_OGS / step_OG1, chosen.scheme).mul_(step_OG1)
        error_OG = rounded_OGS.sub_(weight_OGS).square_().sum(dim=-1)
        is_better_OG = error_OG < least_OG
        best_OG = torch.where(is_better_OG, scale_OG, best_OG)
        least_OG = torch.where(is_better_OG, error_OG, least_OG)
    return best_OG
