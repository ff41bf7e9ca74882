"""What an operator is: a way to compute a linear layer of one format.

Takes nothing; gives the types that operators, the choice among them and layers share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.kernels.formats import Layout, QuantizedWeight, Scheme

Packed = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One linear layer to be computed: its format and shape, the activations' type, the device."""

    layout: Layout
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Operator:
    """A way to compute quantized layers.

    `pack` turns a weight into this operator's own tensors, which are all that is kept;
    `run(x_NI, packed, bias_O, problem)` gives y_NO in x's dtype; `refuses` gives the reason why a
    problem is beyond it, or None.
    """

    name: str
    scheme: Scheme
    refuses: Callable[[Problem], str | None]
    pack: Callable[[QuantizedWeight, Problem], Packed]
    run: Callable[[Tensor, Packed, Tensor | None, Problem], Tensor]


def add_bias(y_NO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return y plus a bias, if there is one."""
    return y_NO if bias_O is None else y_NO + bias_O


def never_refuses(problem: Problem) -> str | None:
    """Return None: this operator runs anything."""
    return None
