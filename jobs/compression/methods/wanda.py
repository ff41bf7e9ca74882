"""Wanda: zero the weights of each output row whose products with their inputs are smallest.

Takes one dense weight and its inputs' moments; gives it with zeros, other weights as they were. It
saves neither bytes nor time by itself, since dense kernels multiply zeros as well.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023.
"""

from torch import Tensor

from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._sparsity import SparsityOptions, kept_by_rows
from jobs.kernels.formats import Layout


class Options(SparsityOptions):
    """How much of each row is pruned."""


def layout(options: Options) -> Layout | None:
    """Return None: pruning does not change how a weight is stored."""
    return None


def apply_calibrated(weight_OI: Tensor, inputs: LayerInputs, options: Options) -> LayerResult:
    """Zero the weights of every row with the smallest |weight| times root mean square input."""
    score_OI = weight_OI.abs() * inputs.gram_II.diagonal().sqrt()
    return LayerResult(weight_OI * kept_by_rows(score_OI, options))
