"""Magnitude pruning (Han et al. 2015): zero the smallest weights of each output row.

Takes one dense weight; gives it with zeros. It saves neither bytes nor time by itself, since dense
kernels multiply zeros as well; it shows what a model can spare.
"""

import torch
from pydantic import Field
from torch import Tensor

from cluster.config import StrictModel
from jobs.compression.methods._protocol import LayerResult
from jobs.kernels.formats import Layout


class Options(StrictModel):
    """How much is pruned."""

    sparsity: float = Field(ge=0, lt=1, description="Share of each row's weights set to zero.")


def layout(options: Options) -> Layout | None:
    """Return None: pruning does not change how a weight is stored."""
    return None


def apply(weight_OI: Tensor, options: Options) -> LayerResult:
    """Zero the `sparsity` share of smallest weights in every row, rounded down."""
    num_zeros = int(options.sparsity * weight_OI.shape[1])
    if num_zeros == 0:
        return LayerResult(weight_OI)
    smallest_OZ = weight_OI.abs().topk(num_zeros, dim=1, largest=False).indices
    mask_OI = torch.ones_like(weight_OI).scatter_(1, smallest_OZ, 0.0)
    return LayerResult(weight_OI * mask_OI)
