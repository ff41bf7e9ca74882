"""Magnitude pruning (Han et al. 2015): zero the smallest weights of each output row.

Takes one dense weight; gives it with zeros. It saves neither bytes nor time by itself, since dense
kernels multiply zeros as well; it shows what a model can spare.
"""

from torch import Tensor

from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._sparsity import SparsityOptions, kept_by_rows
from jobs.kernels.formats import Layout


class Options(SparsityOptions):
    """How much of each row is pruned."""


def layout(options: Options) -> Layout | None:
    """Return None: pruning does not change how a weight is stored."""
    return None


def apply(weight_OI: Tensor, options: Options) -> LayerResult:
    """Zero the smallest weights of every row."""
    return LayerResult(weight_OI * kept_by_rows(weight_OI.abs(), options))
