"""Rotary position embeddings: where a token stands, as an angle for every pair of features.

Takes positions; gives cosines and sines, and rotates queries and keys by them. It does not know
about attention.

B batch, T tokens, H heads, D size of a head (the tables hold half of it)
"""

import math

import torch
from torch import Tensor, nn

from jobs.config import DecoderConfig


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) with linear or Llama 3 scaling."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # Not a buffer: frequencies stay float32 and real whatever the model is cast or moved to.
        self.frequencies_D = _frequencies(config)

    def forward(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of half a head's size, broadcastable over heads."""
        if self.frequencies_D.device != positions_BT.device:
            self.frequencies_D = self.frequencies_D.to(positions_BT.device)
        angles_BT1D = positions_BT[:, :, None, None].float() * self.frequencies_D
        return angles_BT1D.cos().to(dtype), angles_BT1D.sin().to(dtype)


def rotate(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """Return x with the first and second halves of each head rotated against each other."""
    first, second = x_BTHD.chunk(2, dim=-1)
    return torch.cat(
        (first * cos_BT1D - second * sin_BT1D, second * cos_BT1D + first * sin_BT1D), dim=-1
    )


def _frequencies(config: DecoderConfig) -> Tensor:
    size = config.resolved_head_dim
    exponents_D = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies_D = 1.0 / config.rope_theta**exponents_D
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies_D
    slowed_D = frequencies_D / scaling.factor
    if scaling.kind == "linear":
        return slowed_D
    # Llama 3.1 (Meta, models/llama3/reference_impl/model.py): long waves are stretched, short ones
    # kept, those between blended.
    turns_D = scaling.original_max_seq_len * frequencies_D / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_D = ((turns_D - low) / (high - low)).clamp(0.0, 1.0)
    return kept_D * frequencies_D + (1 - kept_D) * slowed_D
