"""The low-rank part of a linear layer with a LoRA adapter (Hu et al. 2021), added in place.

Takes a layer's input, its output and two thin matrices; changes chosen rows of the output. It does
not know which layer or adapter it is.

T rows, N chosen rows, I input features, O output features, R rank, padded to a multiple of 16
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import native

MAX_RANK = 512  # low_rank.cpp, kMaxRank
_LANES = 16

_add = native.function("rs_add_low_rank", "pnpnpnppnnni")


@dataclass(frozen=True)
class LowRank:
    """What one adapter adds to one layer: y += x @ down @ up, in float32, scaled already."""

    down: Tensor
    up: Tensor

    @classmethod
    def create(cls, a_RI: Tensor, b_OR: Tensor, scale: float) -> "LowRank":
        """Return y += scale * x @ a.T @ b.T; a rank that is no multiple of 16 is filled with 0."""
        assert a_RI.shape[0] == b_OR.shape[1] <= MAX_RANK, f"rank {a_RI.shape[0]} is too large"
        padding = -a_RI.shape[0] % _LANES
        down_IR = functional.pad(a_RI.float().T, (0, padding))
        up_RO = functional.pad((b_OR.float() * scale).T, (0, 0, 0, padding))
        return cls(down_IR.contiguous(), up_RO.contiguous())

    def to(self, device: torch.device) -> "LowRank":
        """Return it on another device."""
        return LowRank(self.down.to(device), self.up.to(device))

    def bytes(self) -> int:
        """Return the memory held, in bytes."""
        return self.down.nbytes + self.up.nbytes


def add_low_rank(x_TI: Tensor, y_TO: Tensor, rows_N: Tensor, weight: LowRank) -> None:
    """Add to the rows `rows_N` (int32, on x's device) of y what `weight` makes of x's, in place.

    On CPU in float32 the C++ kernel is used where it is available: there a row's result does not
    depend on the rows beside it.
    """
    is_native = x_TI.dtype == y_TO.dtype == torch.float32 and x_TI.device.type == "cpu"
    if not is_native or not native.is_available():
        delta_NO = x_TI[rows_N].float() @ weight.down @ weight.up
        y_TO.index_add_(0, rows_N, delta_NO.to(y_TO.dtype))
        return
    assert x_TI.stride(1) == y_TO.stride(1) == 1, "features of a row must lie side by side"
    _add(
        *(x_TI.data_ptr(), x_TI.stride(0)),
        *(y_TO.data_ptr(), y_TO.stride(0)),
        *(rows_N.data_ptr(), len(rows_N)),
        *(weight.down.data_ptr(), weight.up.data_ptr()),
        *(x_TI.shape[1], weight.down.shape[1], y_TO.shape[1]),
        native.num_threads(),
    )
