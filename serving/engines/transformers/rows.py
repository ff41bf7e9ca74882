"""Keys and values of sequences that transformers computes together, in its own cache.

Takes tokens of sequences; gives logits of what follows them. It does not know about requests,
sampling or text.

Sequences of a batch end at the same place: shorter ones begin with padding that is masked. A batch
is put together anew only when its sequences change; until then each step appends in place.

N sequences, T new tokens, L cached tokens of the longest, V vocabulary
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache


@dataclass
class _Batch:
    """A cache of some sequences: row n belongs to `keys[n]` and holds `lengths[n]` tokens."""

    keys: list[Hashable]
    lengths: list[int]
    cache: Cache


class Rows:
    """A model with the cache of every sequence it has begun, by any key.

    A model whose cache holds more than keys and values (a recurrent state, say) runs each sequence
    by itself: states cannot be padded.
    """

    def __init__(self, model: PreTrainedModel, *, is_joinable: bool) -> None:
        self._model = model
        self._is_joinable = is_joinable
        self._batch_of: dict[Hashable, _Batch] = {}

    def forget(self, keys: Sequence[Hashable]) -> None:
        """Drop what is held for these sequences."""
        for key in keys:
            self._batch_of.pop(key, None)

    def begin(self, key: Hashable, tokens: Sequence[int]) -> Tensor:
        """Compute the first tokens of a sequence and return logits_1V of what follows."""
        # Without a configuration every layer keeps all tokens, and a sliding window is a mask.
        config = None if self._is_joinable else self._model.config
        self._batch_of[key] = batch = _Batch([key], [0], DynamicCache(config=config))
        return self._step(batch, [list(tokens)])

    def extend(self, key: Hashable, tokens: Sequence[int]) -> Tensor:
        """Compute the next tokens of one sequence and return logits_1V of what follows."""
        return self._step(self._gather([key]), [list(tokens)])

    def step(self, keys: Sequence[Hashable], tokens: Sequence[int]) -> Tensor:
        """Compute the next token of each sequence and return logits_NV of what follows."""
        if self._is_joinable:
            return self._step(self._gather(keys), [[token] for token in tokens])
        return torch.cat([self.extend(k, [token]) for k, token in zip(keys, tokens, strict=True)])

    def length(self, key: Hashable) -> int:
        """Return how many tokens of a sequence are held."""
        batch = self._batch_of.get(key)
        return 0 if batch is None else batch.lengths[batch.keys.index(key)]

    def bytes_per_token(self, key: Hashable) -> int:
        """Return the memory that keys and values of one token take."""
        batch = self._batch_of[key]
        held: list[int] = [
            tensor.nbytes
            for layer in batch.cache.layers
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        ]
        return sum(held) // (len(batch.keys) * max(batch.lengths))

    def _step(self, batch: _Batch, tokens: list[list[int]]) -> Tensor:
        device, num_new = self._model.device, len(tokens[0])
        lengths_N1 = torch.tensor(batch.lengths, device=device)[:, None]
        longest = max(batch.lengths)
        mask_NL = None  # Recurrent models take none, and without padding none is needed.
        if min(batch.lengths) < longest:
            columns_1L = torch.arange(longest + num_new, device=device)[None]
            mask_NL = (columns_1L >= longest - lengths_N1).long()
        output = self._model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=mask_NL,
            position_ids=lengths_N1 + torch.arange(num_new, device=device)[None],
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        batch.lengths = [length + num_new for length in batch.lengths]
        logits_NV: Tensor = output.logits[:, -1].float()
        return logits_NV

    def _gather(self, keys: Sequence[Hashable]) -> _Batch:
        """Return a batch of exactly these sequences, in this order."""
        first = self._batch_of[keys[0]]
        if first.keys == list(keys):
            return first
        places = [(b := self._batch_of[key], b.keys.index(key)) for key in keys]
        lengths = [batch.lengths[row] for batch, row in places]
        cache = DynamicCache()
        for layer in range(len(first.cache.layers)):
            held = [(batch.cache.layers[layer], row) for batch, row in places]
            cache.update(
                _aligned([each.keys[row] for each, row in held], lengths),
                _aligned([each.values[row] for each, row in held], lengths),
                layer,
            )
        joined = _Batch(list(keys), lengths, cache)
        self._batch_of.update(dict.fromkeys(keys, joined))
        return joined


def _aligned(held: list[Tensor], lengths: list[int]) -> Tensor:
    """Return the last `lengths[n]` tokens of each [heads, L, size], zeros before them."""
    shape = list(held[0].shape)
    shape[-2] = max(lengths)
    joined = held[0].new_zeros((len(held), *shape))
    for n, (tensor, length) in enumerate(zip(held, lengths, strict=True)):
        joined[n, :, shape[-2] - length :] = tensor[:, tensor.shape[-2] - length :]
    return joined
