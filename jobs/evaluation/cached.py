"""Whole sequences read through a cache, so that attention sees keys and values as it rounds them.

Takes a model and token ids; gives hidden states, equal to those of an engine whose cache is of this
type, however that cuts prompts: every token is rounded by itself, before anything reads it. It does
not know what is asked of the hidden states.

B sequences, T tokens of each, C hidden width
"""

import torch
from torch import Tensor

from jobs.kernels.block_cache import BlockCache, BlockSpan
from jobs.models.decoder import Decoder

_BLOCK_SIZE = 16


class CachedReading:
    """A model with a cache for `batch_size` sequences of up to `seq_len` tokens."""

    def __init__(self, model: Decoder, dtype: torch.dtype, batch_size: int, seq_len: int) -> None:
        """Allocate the cache, whose keys and values are of a type of BlockCache."""
        self._model = model
        self._device = next(model.parameters()).device
        self._blocks_each = -(-seq_len // _BLOCK_SIZE)
        num_blocks = batch_size * self._blocks_each
        self._cache = BlockCache(model.config, num_blocks, _BLOCK_SIZE, dtype, self._device)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return h_BTC after the final norm; former contents of the cache are not seen."""
        batch, length = tokens_BT.shape
        attention = self._cache.attention([self._span(row, length) for row in range(batch)])
        positions_BT = torch.arange(length, device=self._device).expand(batch, length)
        # The sequences one behind the other, as a pass of an engine has them.
        hidden_1NC = self._model.hidden(
            tokens_BT.reshape(1, -1), positions_BT.reshape(1, -1), attention
        )
        return hidden_1NC.view(batch, length, -1)

    def _span(self, row: int, length: int) -> BlockSpan:
        first = row * self._blocks_each
        return BlockSpan(tuple(range(first, first + self._blocks_each)), 0, length)
