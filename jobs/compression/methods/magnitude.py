"""Magnitude pruning (Han et al. 2015): zero the smallest weights of each layer.

Takes one dense weight; gives it with zeros. It saves neither bytes nor time by itself, since dense
kernels multiply zeros as well; it shows what a model can spare.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._sparsity import SparsityOptions, kept_by_rows, kept_of_all
from jobs.kernels.formats import Layout


class Options(SparsityOptions):
    """How much is pruned."""

    among: Literal["layer", "row"] = Field(
        "layer", description="Weights that compete for the share that stays; not for a `pattern`."
    )


def layout(options: Options) -> Layout | None:
    """Return None: pruning does not change how a weight is stored."""
    return None


def apply(weight_OI: Tensor, options: Options) -> LayerResult:
    """Zero the smallest weights of the layer, or of every row."""
    kept = kept_of_all if options.among == "layer" else kept_by_rows
    return LayerResult(weight_OI * kept(weight_OI.abs(), options))
