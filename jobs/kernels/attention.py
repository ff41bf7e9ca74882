"""Causal attention: what a decoder asks for, and the form of it that training uses.

Takes rotated queries, keys and values; gives what each query attends to. It does not know about
projections or positions, nor about keys and values of earlier passes (see block_cache.py).

B batch, T tokens, H query heads, K key/value heads, D size of a head, L keys
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels.blocked_attention import attend_blocked


class Attention(Protocol):
    """What a decoder calls in every block: mixes values by how well keys match queries."""

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """Return o_BTHD for block number `layer`."""
        ...


def attend_causal(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int | None) -> Tensor:
    """Return o_BTHD where token t attends to itself and those before it, at most `window` of them.

    Keys are shared by groups of query heads when H is a multiple of K.
    """
    length = q_BTHD.shape[1]
    q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    if q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16:
        return attend_blocked(q_BHTD, k_BKTD, v_BKTD, window).transpose(1, 2)
    mask_TT = None
    if window is not None and window < length:
        positions_T = torch.arange(length, device=q_BTHD.device)
        mask_TT = visible(positions_T, positions_T, window)
    o_BHTD = functional.scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD, attn_mask=mask_TT, is_causal=mask_TT is None, enable_gqa=True
    )
    return o_BHTD.transpose(1, 2)


def visible(queries_T: Tensor, keys_L: Tensor, window: int | None) -> Tensor:
    """Return which positions each query sees, [..., T, L]: its own and, in the window, former."""
    distance_TL = queries_T[..., None] - keys_L
    is_past = distance_TL >= 0
    return is_past if window is None else is_past & (distance_TL < window)
