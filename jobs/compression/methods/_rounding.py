"""Choosing scales for weights of few bits, and rounding to them: what quantizing methods share.

Takes a dense weight and a layout; gives scales. It does not know which method asks.

O output features, I input features, G groups of inputs that share a scale, S inputs of a group
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cluster.config import StrictModel
from jobs.kernels.formats import (
    DEFAULT_GROUP_SIZE,
    GROUPED,
    Layout,
    Scheme,
    round_scale,
    round_values_,
    value_range,
)

_GRID = tuple(1.0 - 0.0125 * step for step in range(25))
Observer = Literal["minmax", "mse"]


class RoundingOptions(StrictModel):
    """Into which format, and how scales are chosen."""

    scheme: Scheme = Field(
        "w8a8", description="bf16 (leave dense), w8a8, fp8, w8a16, w4a16, w4a8 or w3a16."
    )
    group_size: int | None = Field(
        DEFAULT_GROUP_SIZE,
        ge=16,
        description="w8a16, int4, int3: inputs that share a scale, a power of 2; null: all of an "
        "output.",
    )
    observer: Observer = Field("mse", description="How a scale is chosen.")

    @model_validator(mode="after")
    def _check_group_size(self) -> Self:
        size = self.group_size
        if self.scheme not in GROUPED and "group_size" in self.model_fields_set:
            raise ValueError(
                f"scheme={self.scheme} has no groups and group_size={size} would say nothing. "
                f"Leave it out; it is for {', '.join(GROUPED)}"
            )
        if size is not None and size & (size - 1):
            raise ValueError(f"group_size={size} is not a power of 2")
        return self

    def chosen_layout(self) -> Layout:
        """Return the format these options choose."""
        is_grouped = self.scheme in GROUPED
        return Layout(self.scheme, self.group_size if is_grouped else None)


def find_scale(weight_OI: Tensor, layout: Layout, observer: Observer) -> Tensor:
    """Return scale_OG: the largest weight's, or with `mse` that clipped by the best ratio.

    Best is what leaves the least sum of cubed errors: large weights belong to what the model relies
    on, and squares clip them too readily. (llmcompressor and GPTQ's authors take the power 2.4.)
    """
    groups = layout.num_groups(weight_OI.shape[1])
    weight_OGS = weight_OI.float().unflatten(1, (groups, -1))
    _, high = value_range(layout.scheme)
    largest_OG = weight_OGS.abs().amax(dim=-1) / high
    if observer == "minmax":
        return round_scale(largest_OG)
    return _best_scale(weight_OGS, largest_OG, layout.scheme)


def _best_scale(weight_OGS: Tensor, largest_OG: Tensor, scheme: Scheme) -> Tensor:
    """Return the scale on the grid below the largest that leaves the least cubed error."""
    best_OG = largest_OG
    least_OG = torch.full_like(largest_OG, torch.inf)
    for ratio in _GRID:
        scale_OG = round_scale(largest_OG * ratio)
        step_OG1 = scale_OG[:, :, None]
        rounded_OGS = round_values_(weight_OGS / step_OG1, scheme).mul_(step_OG1)
        error_OGS = rounded_OGS.sub_(weight_OGS).abs_()
        error_OG = (error_OGS * error_OGS.square()).sum(dim=-1)
        is_better_OG = error_OG < least_OG
        best_OG = torch.where(is_better_OG, scale_OG, best_OG)
        least_OG = torch.where(is_better_OG, error_OG, least_OG)
    return best_OG
