"""Attention over blocks of a cache by PyTorch's operators, for any device.

Takes the tensors of a pool of blocks and the spans of a pass; gives the attention of that pass. It
does not know who owns which block.

T tokens of the pass, H query heads, K key/value heads, D size of a head, N sequences that are
computed together, Q queries of each, L cached tokens, P blocks of a sequence, S tokens of a block
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels.attention import visible
from jobs.kernels.formats import quantize_rows


@dataclass(frozen=True)
class BlockSpan:
    """Tokens [start, start + length) of the sequence whose token t is in blocks[t // block_size].

    `blocks` may be longer than the span needs.
    """

    blocks: tuple[int, ...]
    start: int
    length: int

    @property
    def stop(self) -> int:
        """Number of tokens that the sequence's blocks hold once the span is written."""
        return self.start + self.length


class GatheredAttention:
    """Attention of one forward pass over blocks that are gathered into whole sequences.

    Everything that all layers share is computed once. Spans of one token are computed together.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        scales: Tensor | None,
        spans: Sequence[BlockSpan],
        window: int | None,
    ) -> None:
        self._keys, self._values, self._scales = keys, values, scales
        device, block_size = keys.device, keys.shape[3]
        self._num_tokens = sum(span.length for span in spans)
        written = [(s.blocks[t // block_size], t % block_size) for s in spans for t in _tokens(s)]
        self._blocks_T, self._places_T = torch.tensor(written, device=device).unbind(1)
        decodes, self._gathers, offset = [], [], 0
        for span in spans:
            if span.length == 1:
                decodes.append((span, offset))
            else:
                self._gathers.append(_gather([(span, offset)], window, block_size, device))
            offset += span.length
        if decodes:
            self._gathers.append(_gather(decodes, window, block_size, device))

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """Return o_BTHD for block number `layer`, of rotated queries and keys."""
        assert q_BTHD.shape[:2] == (1, self._num_tokens), (
            f"expected 1 x {self._num_tokens} tokens, found {tuple(q_BTHD.shape[:2])}"
        )
        self._write(self._keys, 0, layer, k_BTKD[0])
        self._write(self._values, 1, layer, v_BTKD[0])
        o_THD = torch.empty_like(q_BTHD[0])
        dtype = q_BTHD.dtype if self._scales is not None else self._keys.dtype
        for gather in self._gathers:
            keys_NKLD = self._read(self._keys, 0, layer, gather.blocks_NP, dtype)
            values_NKLD = self._read(self._values, 1, layer, gather.blocks_NP, dtype)
            # Tokens that no query sees may be left from another sequence, and 0 x NaN is NaN.
            unseen_N1L1 = gather.hidden_NQL.all(dim=1)[:, None, :, None]
            keys_NKLD.masked_fill_(unseen_N1L1, 0)
            values_NKLD.masked_fill_(unseen_N1L1, 0)
            num_queries = gather.hidden_NQL.shape[1]
            q_NQHD = q_BTHD[0, gather.rows_N].to(dtype).unflatten(0, (-1, num_queries))
            o_NHQD = functional.scaled_dot_product_attention(
                q_NQHD.transpose(1, 2),
                keys_NKLD,
                values_NKLD,
                attn_mask=~gather.hidden_NQL[:, None],
                enable_gqa=True,
            )
            o_THD[gather.rows_N] = o_NHQD.transpose(1, 2).flatten(0, 1).to(o_THD.dtype)
        return o_THD[None]

    def _write(self, cache: Tensor, which: int, layer: int, x_TKD: Tensor) -> None:
        if self._scales is None:
            cache[layer][self._blocks_T, :, self._places_T] = x_TKD.to(cache.dtype)
            return
        values_TKD, scale_TK1 = quantize_rows(x_TKD)
        cache[layer][self._blocks_T, :, self._places_T] = values_TKD
        self._scales[which, layer][self._blocks_T, :, self._places_T] = scale_TK1[..., 0]

    def _read(
        self, cache: Tensor, which: int, layer: int, blocks_NP: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return a copy [N, K, L, D] of the sequences' tokens."""
        x_NPKSD = cache[layer, blocks_NP]
        if self._scales is not None:
            scale_NPKS = self._scales[which, layer, blocks_NP]
            x_NPKSD = (x_NPKSD.float() * scale_NPKS[..., None]).to(dtype)
        return x_NPKSD.transpose(1, 2).flatten(2, 3)


class _Gather(NamedTuple):
    """Queries of equal number Q in N sequences: their rows in the pass, flat, the blocks their
    sequences live in, and True for each token L that a query must not see."""

    rows_N: Tensor  # noqa: N815
    blocks_NP: Tensor  # noqa: N815
    hidden_NQL: Tensor  # noqa: N815


def _tokens(span: BlockSpan) -> range:
    return range(span.start, span.stop)


def _gather(
    placed: Sequence[tuple[BlockSpan, int]],
    window: int | None,
    block_size: int,
    device: torch.device,
) -> _Gather:
    """Return how spans of equal length are read; `placed` has each with its first row."""
    num_blocks = max(-(-span.stop // block_size) for span, _ in placed)
    # Short sequences are filled up with a block of their own, of which nothing is seen.
    blocks = [
        [*span.blocks[:num_blocks], *(num_blocks - len(span.blocks)) * span.blocks[:1]]
        for span, _ in placed
    ]
    rows = [row for span, offset in placed for row in range(offset, offset + span.length)]
    queries_NQ = torch.tensor([list(_tokens(span)) for span, _ in placed], device=device)
    positions_L = torch.arange(num_blocks * block_size, device=device)
    return _Gather(
        torch.tensor(rows, device=device),
        torch.tensor(blocks, device=device),
        ~visible(queries_NQ, positions_L, window),
    )
