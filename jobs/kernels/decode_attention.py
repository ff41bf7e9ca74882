"""Attention of a pass that reads one token of each of many sequences, by a fixed list of operators.

Takes a pool of blocks, and tensors that say where each sequence lives and where it stands; gives
the attention of that pass. Shapes depend on the shapes of those tensors alone and nothing is read
back from the device, so that the pass can be recorded once and replayed with other contents.

N sequences (T = N tokens, B = 1), H query heads, K key/value heads, G = H / K, D size of a head,
P blocks of each sequence, S tokens of a block, L = P x S
"""

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels.attention import visible
from jobs.kernels.block_pool import BlockPool


class DecodeAttention:
    """Attention of one token of each sequence to that sequence, at most `window` tokens of it.

    Token n stands at `positions_N[n]` of the sequence whose token t is in block
    `blocks_NP[n, t // S]`; blocks behind that token's are not read, but must exist. Two rows may be
    the same token of the same sequence.
    """

    def __init__(
        self, pool: BlockPool, blocks_NP: Tensor, positions_N: Tensor, window: int | None
    ) -> None:
        self._pool = pool
        places_N = positions_N % pool.block_size
        indices_N1 = (positions_N // pool.block_size)[:, None]
        current_N1 = blocks_NP.gather(1, indices_N1)
        self._places = (current_N1[:, 0], places_N)
        # What another sequence left in the block would be masked, but 0 x NaN is NaN. Clearing it
        # once a pass costs less than masking what every layer reads.
        pool.clear_behind(self._places)
        order_P = torch.arange(blocks_NP.shape[1], device=pool.device)
        self._rows_NKP = pool.rows(torch.where(order_P <= indices_N1, blocks_NP, current_N1))
        positions_L = torch.arange(blocks_NP.shape[1] * pool.block_size, device=pool.device)
        self._is_visible_NL = visible(positions_N[:, None], positions_L, window)[:, 0]
        self._mask_N11L: Tensor | None = None

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """Return o_BTHD for block number `layer`, of rotated queries and keys."""
        pool = self._pool
        num_tokens = len(self._rows_NKP)
        assert q_BTHD.shape[:2] == (1, num_tokens), (
            f"expected 1 x {num_tokens} tokens, found {tuple(q_BTHD.shape[:2])}"
        )
        pool.write(layer, self._places, k_BTKD[0], v_BTKD[0])
        dtype = pool.dtype_for(q_BTHD.dtype)
        keys_NKLD, values_NKLD = pool.read(layer, self._rows_NKP, dtype)
        # Heads that share keys stand side by side: as queries of one head they need no copies of
        # keys, and CUDA's memory-efficient kernel takes them, which knows masks but no groups.
        q_NKGD = q_BTHD[0].to(dtype).unflatten(1, (pool.num_heads, -1))
        o_NKGD = functional.scaled_dot_product_attention(
            q_NKGD, keys_NKLD, values_NKLD, attn_mask=self._mask(dtype)
        )
        return o_NKGD.flatten(1, 2)[None].to(q_BTHD.dtype)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores; made once a pass, since all layers share it."""
        if self._mask_N11L is None or self._mask_N11L.dtype != dtype:
            zeros_NL = torch.zeros_like(self._is_visible_NL, dtype=dtype)
            hidden_NL = ~self._is_visible_NL
            self._mask_N11L = zeros_NL.masked_fill(hidden_NL, -torch.inf)[:, None, None]
        return self._mask_N11L
