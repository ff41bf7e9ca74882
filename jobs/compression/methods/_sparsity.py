"""Which weights are pruned: a share of them, or all but N of every M inputs in a row.

Takes scores of weights; gives a mask. It does not know what the scores are.

O output features, I input features
"""

import re
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cluster.config import StrictModel

_PATTERN = re.compile(r"(\d+):(\d+)")


class SparsityOptions(StrictModel):
    """How much is pruned: `sparsity` or `pattern`."""

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="Share of the weights set to zero; unset: by `pattern`."
    )
    pattern: str | None = Field(
        None, description="`N:M`, e.g. 2:4: of every M inputs of a row, N are kept."
    )

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity (e.g. 0.5) or pattern (e.g. 2:4)")
        if self.pattern is not None:
            found = _PATTERN.fullmatch(self.pattern)
            if found is None or not 0 < int(found[1]) < int(found[2]):
                raise ValueError(f"pattern={self.pattern!r} is not `N:M` with 0 < N < M, like 2:4")
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """N and M of the pattern; None: the share counts."""
        found = _PATTERN.fullmatch(self.pattern or "")
        return (int(found[1]), int(found[2])) if found else None


def kept_by_rows(score_OI: Tensor, options: SparsityOptions) -> Tensor:
    """Return which weights stay: in every row, or every M of a row, those of the highest scores.

    A share is rounded down to whole weights of a row. M divides the inputs.
    """
    if options.kept_of is not None:
        return kept_by_pattern(score_OI, *options.kept_of)
    assert options.sparsity is not None, "checked by the options"
    num_zeros = int(options.sparsity * score_OI.shape[1])
    return _all_but_lowest(score_OI, num_zeros)


def kept_of_all(score_OI: Tensor, options: SparsityOptions) -> Tensor:
    """Return which weights stay: of all, or of every M of a row, those of the highest scores.

    A share is rounded down to whole weights. M divides the inputs.
    """
    if options.kept_of is not None:
        return kept_by_pattern(score_OI, *options.kept_of)
    return kept_by_rows(score_OI.flatten()[None], options).view_as(score_OI)


def kept_by_pattern(score_OI: Tensor, kept: int, of: int) -> Tensor:
    """Return which weights stay: `kept` of every `of` consecutive ones in a row."""
    assert score_OI.shape[1] % of == 0, f"{kept}:{of} of {score_OI.shape[1]} inputs: not refused"
    score_OGM = score_OI.unflatten(1, (-1, of))
    return _all_but_lowest(score_OGM, of - kept).flatten(1)


def _all_but_lowest(score: Tensor, num_zeros: int) -> Tensor:
    is_kept = torch.ones_like(score, dtype=torch.bool)
    if num_zeros:
        lowest = score.topk(num_zeros, dim=-1, largest=False).indices
        is_kept.scatter_(-1, lowest, value=False)
    return is_kept
