"""Sequences side by side in a cache of keys and values, as an engine of that kind keeps them.

Takes a model, the kind of its cache and token ids; gives room for sequences, and hidden states of
whole ones, equal to those of an engine whose cache is of this kind, however that cuts prompts:
every token is rounded by itself, before anything reads it. It does not know what is asked of the
hidden states.

B sequences, T tokens of each, C hidden width
"""

import torch
from torch import Tensor

from jobs.config import KvCache
from jobs.kernels.block_cache import BlockCache, BlockSpan
from jobs.models.decoder import Decoder

_BLOCK_SIZE = 16


class SequenceCache:
    """A cache with room for so many sequences of so many tokens, each in blocks of its own."""

    def __init__(self, model: Decoder, kv_cache: KvCache, num_sequences: int, seq_len: int) -> None:
        """Allocate it: int8, or else in the type of activations."""
        norm = model.model.norm.weight  # An embedding may be stored in a narrower type.
        self._blocks_each = -(-seq_len // _BLOCK_SIZE)
        self.blocks = BlockCache(
            model.config,
            num_sequences * self._blocks_each,
            _BLOCK_SIZE,
            torch.int8 if kv_cache == "int8" else norm.dtype,
            device=norm.device,
        )

    def span(self, row: int, start: int, length: int) -> BlockSpan:
        """Return the place of some tokens of a sequence."""
        first = row * self._blocks_each
        return BlockSpan(tuple(range(first, first + self._blocks_each)), start, length)


class CachedReading:
    """A model with a cache for `batch_size` sequences of up to `seq_len` tokens."""

    def __init__(self, model: Decoder, kv_cache: KvCache, batch_size: int, seq_len: int) -> None:
        """Allocate the cache."""
        self._model = model
        self._device = next(model.parameters()).device
        self._cache = SequenceCache(model, kv_cache, batch_size, seq_len)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return h_BTC after the final norm; former contents of the cache are not seen."""
        batch, length = tokens_BT.shape
        spans = [self._cache.span(row, 0, length) for row in range(batch)]
        attention = self._cache.blocks.attention(spans)
        positions_BT = torch.arange(length, device=self._device).expand(batch, length)
        # The sequences one behind the other, as a pass of an engine has them.
        hidden_1NC = self._model.hidden(
            tokens_BT.reshape(1, -1), positions_BT.reshape(1, -1), attention
        )
        return hidden_1NC.view(batch, length, -1)
