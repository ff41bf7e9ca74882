"""What calibration text feeds a linear layer: a few sums over all tokens.

Takes inputs batch by batch; gives the sums that methods read. It keeps no activations: its size
depends on the layer's width alone. It does not know which layer or method it is for.

N tokens, I input features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerInputs:
    """Moments of a layer's inputs x_NI over all tokens, in float32."""

    gram_II: Tensor  # noqa: N815  # mean of x xᵀ; half the Hessian of the layer's squared error
    mean_abs_I: Tensor  # noqa: N815
    max_abs_I: Tensor  # noqa: N815
    num_tokens: int

    def divided_by(self, scale_I: Tensor) -> "LayerInputs":
        """Return the moments of x / scale."""
        return LayerInputs(
            self.gram_II / (scale_I[:, None] * scale_I),
            self.mean_abs_I / scale_I,
            self.max_abs_I / scale_I,
            self.num_tokens,
        )

    def to(self, device: torch.device) -> "LayerInputs":
        """Return the same moments on a device."""
        return LayerInputs(
            self.gram_II.to(device),
            self.mean_abs_I.to(device),
            self.max_abs_I.to(device),
            self.num_tokens,
        )

    def squared_error(self, difference_OI: Tensor, weight_O: Tensor | None = None) -> Tensor:
        """Return the mean squared change of the layer's outputs, summed over them: a scalar.

        `weight_O` weighs outputs; without it all count alike.
        """
        error_O = (difference_OI @ self.gram_II).mul_(difference_OI).sum(dim=1)
        return error_O.sum() if weight_O is None else error_O @ weight_O


class InputSource(Protocol):
    """What text feeds the layers of a decoder, one block after another."""

    def observe(self, layers: Sequence[str]) -> dict[str, LayerInputs]:
        """Return what the text feeds these layers of the block that is at hand, or the head."""

    def effects(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return how much each output of these layers changes what the block gives: effect_O."""

    def advance(self) -> None:
        """Go on to the next block."""


class InputSums:
    """Adds up inputs as they come."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._gram_II = torch.zeros(in_features, in_features, device=device)
        self._sum_abs_I = torch.zeros(in_features, device=device)
        self._max_abs_I = torch.zeros(in_features, device=device)
        self._num_tokens = 0

    def add(self, x_NI: Tensor) -> None:
        """Take the inputs of some tokens."""
        x_NI = x_NI.float()
        abs_NI = x_NI.abs()
        self._gram_II.addmm_(x_NI.T, x_NI)
        self._sum_abs_I += abs_NI.sum(dim=0)
        torch.maximum(self._max_abs_I, abs_NI.amax(dim=0), out=self._max_abs_I)
        self._num_tokens += x_NI.shape[0]

    def moments(self) -> LayerInputs:
        """Return what was added so far."""
        assert self._num_tokens > 0, "no inputs were seen"
        return LayerInputs(
            self._gram_II / self._num_tokens,
            self._sum_abs_I / self._num_tokens,
            self._max_abs_I,
            self._num_tokens,
        )
