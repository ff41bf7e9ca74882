"""Magnitude pruning (Han et al. 2015): zero the smallest weights of each layer.

Takes one dense weight; gives it with zeros. It saves neither bytes nor time by itself, since dense
kernels multiply zeros as well; it shows what a model can spare.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._sparsity import SparsityOptions, kept_by_rows, kept_of_all
from jobs.kernels.formats import Layout


class Options(SparsityOptions):
    """How much is pruned."""

    among: Literal["layer", "row"] = Field(
        "layer", description="Weights that compete for the share that stays; not for a `pattern`."
    )

    @model_validator(mode="after")
    def _check_among_is_used(self) -> Self:
        if self.pattern is not None and "among" in self.model_fields_set:
            raise ValueError(
                f"among={self.among} is for a share: weights of pattern={self.pattern} compete "
                "within each group. Leave it out"
            )
        return self


def layout(options: Options) -> Layout | None:
    """Return None: pruning does not change how a weight is stored."""
    return None


def apply(weight_OI: Tensor, options: Options) -> LayerResult:
    """Zero the smallest weights of the layer, or of every row."""
    kept = kept_of_all if options.among == "layer" else kept_by_rows
    return LayerResult(weight_OI * kept(weight_OI.abs(), options))
