"""What an operator is: a way to compute a linear layer of one format.

Takes nothing; gives the types that operators, the choice among them and layers share.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.kernels.formats import Layout, QuantizedWeight, Scheme
from jobs.kernels.rows import QuantizedRows

Packed = tuple[Tensor, ...]
Weight = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Problem:
    """One linear layer to be computed: its format and shape, the activations' type, the device."""

    layout: Layout
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Inputs, outputs, and the group size where the format has groups, as kernels take them."""
        group_size = self.layout.group_size
        groups = () if group_size is None else (group_size,)
        return (self.in_features, self.out_features, *groups)


@dataclass(frozen=True)
class InPlace:
    """How a C++ operator writes its results to where they are needed.

    `multiply(x, packed, bias_O, y_NO, accumulate)` sets float32 y, or adds to it; x is
    QuantizedRows where `takes_int8`, else float32 rows. Packed tensors are in blocks of outputs
    (blocks.py), so those of layers with the same inputs may be joined along dimension 0.
    """

    takes_int8: bool
    multiply: Callable[[Tensor | QuantizedRows, Packed, Tensor | None, Tensor, Problem, bool], None]


@dataclass(frozen=True)
class Operator:
    """A way to compute layers of one format.

    `pack` turns a weight (a plain tensor for bf16) into this operator's own tensors, which are all
    that is kept; `run(x_NI, packed, bias_O, problem)` gives y_NO in x's dtype; `refuses` gives the
    reason why a problem is beyond it, or None. `has_exact_rows`: a row's result has the same bits
    whatever rows it is computed with, and however many.
    """

    name: str
    scheme: Scheme
    refuses: Callable[[Problem], str | None]
    pack: Callable[[Weight, Problem], Packed]
    run: Callable[[Tensor, Packed, Tensor | None, Problem], Tensor]
    in_place: InPlace | None = None
    has_exact_rows: bool = False


def quantized(weight: Weight) -> QuantizedWeight:
    """Return the weight of a format that is not dense, typed as one."""
    assert isinstance(weight, QuantizedWeight), "this operator takes quantized weights"
    return weight


def add_bias(y_NO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return y plus a bias, if there is one."""
    return y_NO if bias_O is None else y_NO + bias_O


def never_refuses(problem: Problem) -> str | None:
    """Return None: this operator runs anything."""
    return None
