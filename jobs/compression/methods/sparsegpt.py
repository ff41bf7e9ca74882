"""SparseGPT: zero weights block by block, and let the columns still to come make up for them.

Takes one dense weight and its inputs' moments; gives it with zeros and the others changed, so that
the layer's outputs stay near to what they were. It saves neither bytes nor time by itself, since
dense kernels multiply zeros as well. Weights that are zero already count as pruned and stay so.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", 2023.

O output features, I input features, B columns of a block
"""

from pydantic import Field
from torch import Tensor

from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._sparsity import SparsityOptions, kept_of_all
from jobs.compression.surgeon import BLOCK, operate
from jobs.kernels.formats import Layout


class Options(SparsityOptions):
    """How much of each block of columns is pruned, and how errors are made up for."""

    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the Hessian's diagonal, over its mean."
    )


def layout(options: Options) -> Layout | None:
    """Return None: pruning does not change how a weight is stored."""
    return None


def apply_calibrated(weight_OI: Tensor, inputs: LayerInputs, options: Options) -> LayerResult:
    """Zero the weights whose loss costs least, and change the others to make up for it."""
    block = BLOCK
    if options.kept_of is not None:
        block = -(-BLOCK // options.kept_of[1]) * options.kept_of[1]
    rule = _Pruning(weight_OI == 0, options)
    return LayerResult(
        operate(weight_OI, inputs.gram_II, rule, damping=options.damping, block=block)
    )


class _Pruning:
    """Zeroes columns by the mask of their block."""

    def __init__(self, is_zero_OI: Tensor, options: Options) -> None:
        self._is_zero_OI, self._options = is_zero_OI, options
        self._start, self._is_kept_OB = 0, is_zero_OI[:, :0]

    def enter(self, start: int, weight_OB: Tensor, diagonal_B: Tensor) -> None:
        score_OB = (weight_OB / diagonal_B).square_()
        score_OB[self._is_zero_OI[:, start : start + weight_OB.shape[1]]] = -1.0
        # A pattern or a share may keep more than there are; what was zero stays so all the same.
        self._is_kept_OB = kept_of_all(score_OB, self._options) & (score_OB >= 0)
        self._start = start

    def settle(self, column: int, weight_O: Tensor) -> Tensor:
        return weight_O * self._is_kept_OB[:, column - self._start]
