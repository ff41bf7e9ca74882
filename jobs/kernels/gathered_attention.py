"""Attention over blocks of a cache by PyTorch's operators, for any device.

Takes a pool of blocks and the spans of a pass; gives the attention of that pass. It
does not know who owns which block.

T tokens of the pass, H query heads, K key/value heads, D size of a head, N sequences that are
computed together, Q queries of each, L cached tokens, P blocks of a sequence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels.attention import visible
from jobs.kernels.block_pool import BlockPool


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

    Everything that all layers share is computed once. Spans of one token are computed together, and
    so are longer ones that are equally long and end in equally many blocks.
    """

    def __init__(self, pool: BlockPool, spans: Sequence[BlockSpan], window: int | None) -> None:
        self._pool = pool
        block_size = pool.block_size
        self._num_tokens = sum(span.length for span in spans)
        written = [(s.blocks[t // block_size], t % block_size) for s in spans for t in _tokens(s)]
        self._blocks_T, self._places_T = torch.tensor(written, device=pool.device).unbind(1)
        alike: dict[tuple[int, int], list[tuple[BlockSpan, int]]] = {}
        offset = 0
        for span in spans:
            kind = (span.length, 0 if span.length == 1 else -(-span.stop // block_size))
            alike.setdefault(kind, []).append((span, offset))
            offset += span.length
        self._gathers = [_gather(placed, window, pool) for placed in alike.values()]

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """Return o_BTHD for block number `layer`, of rotated queries and keys."""
        assert q_BTHD.shape[:2] == (1, self._num_tokens), (
            f"expected 1 x {self._num_tokens} tokens, found {tuple(q_BTHD.shape[:2])}"
        )
        pool = self._pool
        pool.write(layer, (self._blocks_T, self._places_T), k_BTKD[0], v_BTKD[0])
        o_THD = torch.empty_like(q_BTHD[0])
        dtype = pool.dtype_for(q_BTHD.dtype)
        for gather in self._gathers:
            keys_NKLD, values_NKLD = pool.read(layer, gather.rows_NKP, dtype)
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


class _Gather(NamedTuple):
    """Queries of equal number Q in N sequences: their rows in the pass, flat, the rows of the pool
    their sequences live in, and True for each token L that a query must not see."""

    rows_N: Tensor  # noqa: N815
    rows_NKP: Tensor  # noqa: N815
    hidden_NQL: Tensor  # noqa: N815


def _tokens(span: BlockSpan) -> range:
    return range(span.start, span.stop)


def _gather(
    placed: Sequence[tuple[BlockSpan, int]], window: int | None, pool: BlockPool
) -> _Gather:
    """Return how spans of equal length are read; `placed` has each with its first row."""
    block_size, device = pool.block_size, pool.device
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
        pool.rows(torch.tensor(blocks, device=device)),
        ~visible(queries_NQ, positions_L, window),
    )
