"""Optimal brain surgery on a weight: change columns one by one, let the others make up for it.

Takes a weight, the Gram matrix of its inputs and a rule that says what becomes of each column;
gives the weight in which every later column has taken over what the earlier ones lost. It does not
know what a rule does: rounding makes it GPTQ, zeroing makes it SparseGPT.

Source: Frantar and Alistarh, "Optimal Brain Compression", 2022; "GPTQ", 2022, section 3.

O output features, I input features, B columns of a block
"""

from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import RecipeError

BLOCK = 128  # columns that take over errors together; later ones wait for their end


class Rule(Protocol):
    """What becomes of columns, in the order in which they come."""

    def enter(self, start: int, weight_OB: Tensor, diagonal_B: Tensor) -> None:
        """Look at a block, from column `start` on, before its columns change.

        `diagonal_B` are the roots of the conditional variances that a column's error is divided by:
        w² / d² is the loss that zeroing w costs after the others made up for it.
        """

    def settle(self, column: int, weight_O: Tensor) -> Tensor:
        """Return what a column becomes; a view of the block's later columns may be read, too."""
        ...


def operate(
    weight_OI: Tensor, gram_II: Tensor, rule: Rule, *, damping: float, block: int = BLOCK
) -> Tensor:
    """Return the weight after every column was settled from left to right.

    `damping` is added to the Gram matrix's diagonal, as a share of its mean. Inputs that are always
    zero keep their column's weights as the rule wants them, at no loss. Raises RecipeError if the
    matrix is singular all the same.
    """
    factor_II = _factor(gram_II, damping)
    weight_OI = weight_OI.clone()
    for start in range(0, weight_OI.shape[1], block):
        stop = min(start + block, weight_OI.shape[1])
        weight_OB, factor_BB = weight_OI[:, start:stop], factor_II[start:stop, start:stop]
        diagonal_B = factor_BB.diagonal()
        rule.enter(start, weight_OB, diagonal_B)
        error_OB = torch.empty_like(weight_OB)
        for place in range(stop - start):
            settled_O = rule.settle(start + place, weight_OB[:, place])
            error_O = (weight_OB[:, place] - settled_O) / diagonal_B[place]
            weight_OB[:, place:].addr_(error_O, factor_BB[place, place:], alpha=-1)
            weight_OB[:, place] = settled_O
            error_OB[:, place] = error_O
        weight_OI[:, stop:].addmm_(error_OB, factor_II[start:stop, stop:], alpha=-1)
    return weight_OI


def _factor(gram_II: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    damped_II = gram_II.clone()
    diagonal_I = damped_II.diagonal()
    mean = diagonal_I.mean()
    diagonal_I[diagonal_I == 0] = mean if mean > 0 else 1.0
    diagonal_I += damping * mean
    lower_II, is_singular = torch.linalg.cholesky_ex(damped_II)
    if not is_singular:
        inverse_II = torch.cholesky_inverse(lower_II)
        upper_II, is_singular = torch.linalg.cholesky_ex(inverse_II, upper=True)
    if is_singular or not torch.isfinite(upper_II).all():
        raise RecipeError(
            f"the inputs' Hessian is singular with damping={damping:g}: the calibration text gives "
            f"{len(gram_II)} inputs too little variety. Raise `damping`, or give more text."
        )
    return upper_II
