"""The tensors of a pool of blocks, written and read by PyTorch's operators on any device.

Takes keys and values with the places they belong to; gives back what blocks hold, whole sequences
at a time. It does not know who owns which block, nor what is done with what it gives.

T tokens, K key/value heads, D size of a head, N sequences, P blocks of each, S tokens of a block,
L = P x S
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.kernels.formats import quantize_rows


@dataclass(frozen=True)
class BlockPool:
    """Keys and values [layers, blocks, K, S, D]; in int8 with scales [2, layers, blocks, K, S]."""

    keys: Tensor
    values: Tensor
    scales: Tensor | None

    @property
    def device(self) -> torch.device:
        """Where the pool is."""
        return self.keys.device

    @property
    def num_heads(self) -> int:
        """Key/value heads."""
        return self.keys.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[3]

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type that queries of a type meet keys and values in."""
        return dtype if self.scales is not None else self.keys.dtype

    def write(
        self, layer: int, places: tuple[Tensor, Tensor], k_TKD: Tensor, v_TKD: Tensor
    ) -> None:
        """Store tokens; `places` are the block and the place in it of each."""
        blocks_T, places_T = places
        for which, (cache, x_TKD) in enumerate(((self.keys, k_TKD), (self.values, v_TKD))):
            if self.scales is None:
                cache[layer][blocks_T, :, places_T] = x_TKD.to(cache.dtype)
                continue
            values_TKD, scale_TK1 = quantize_rows(x_TKD)
            cache[layer][blocks_T, :, places_T] = values_TKD
            self.scales[which, layer][blocks_T, :, places_T] = scale_TK1[..., 0]

    def clear_behind(self, places: tuple[Tensor, Tensor]) -> None:
        """Set to 0, in all layers, what blocks hold behind these places.

        The last place of a block may be set to 0 itself, if it is given.
        """
        blocks_T, places_T = places
        offsets_S = torch.arange(1, self.block_size + 1, device=self.device)
        behind_TS = (places_T[:, None] + offsets_S).clamp_max(self.block_size - 1)
        self.keys[:, blocks_T[:, None], :, behind_TS] = 0
        self.values[:, blocks_T[:, None], :, behind_TS] = 0
        if self.scales is not None:
            self.scales[:, :, blocks_T[:, None], :, behind_TS] = 0

    def rows(self, blocks_NP: Tensor) -> Tensor:
        """Return which rows of a layer, heads apart, `read` takes for sequences in these blocks."""
        heads_K = torch.arange(self.num_heads, device=self.device)
        return blocks_NP[:, None, :] * self.num_heads + heads_K[None, :, None]

    def read(self, layer: int, rows_NKP: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return copies [N, K, L, D] of the sequences' keys and values."""
        # One copy: a block and a head are a row of S x D values, and rows come in reading order.
        k_NKPSD, v_NKPSD = (x[layer].flatten(0, 1)[rows_NKP] for x in (self.keys, self.values))
        if self.scales is not None:
            scales_NKPS = [x[layer].flatten(0, 1)[rows_NKP] for x in self.scales]
            k_NKPSD = (k_NKPSD.float() * scales_NKPS[0][..., None]).to(dtype)
            v_NKPSD = (v_NKPSD.float() * scales_NKPS[1][..., None]).to(dtype)
        return k_NKPSD.flatten(2, 3), v_NKPSD.flatten(2, 3)
