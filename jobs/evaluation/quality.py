"""How well a model predicts held-out text, and what it answers greedily.

Takes a model and token ids; gives losses per sequence, from which `intervals` makes a paired
comparison. It does not know where the tokens come from or which limits apply.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from jobs.config import KvCache
from jobs.evaluation.cached import CachedReading
from jobs.evaluation.intervals import Interval, perplexity_increase
from jobs.models.decoder import Decoder

__all__ = ["Interval", "greedy_reference", "hidden_pass", "perplexity_increase", "sequence_losses"]

_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32


def sequence_losses(
    model: Decoder,
    sequences: NDArray[np.int64],
    batch_size: int = 8,
    *,
    kv_cache: KvCache = "auto",
    logits_at_once: int = _LOGITS_AT_ONCE,
) -> NDArray[np.float64]:
    """Return the mean cross entropy of every sequence, in nats per token.

    `sequences` is [N, T+1] token ids: the first T are the input, the last T what is predicted.
    The result is [N]; its mean is the log of the perplexity. With `kv_cache` int8 attention reads
    keys and values as an engine does that caches them so. At most `logits_at_once` logits are in
    memory at a time.
    """
    assert sequences.ndim == 2, f"expected [N, T+1] token ids, found shape {sequences.shape}"
    assert sequences.shape[1] >= 2, "a sequence needs an input and a target"
    device = _device(model)
    hidden = hidden_pass(model, kv_cache, batch_size, sequences.shape[1] - 1)
    losses = []
    with torch.inference_mode():
        for start in range(0, len(sequences), batch_size):
            rows = torch.from_numpy(np.ascontiguousarray(sequences[start : start + batch_size]))
            rows = rows.to(device, torch.long)
            losses.append(_batch_losses(model, hidden(rows[:, :-1]), rows[:, 1:], logits_at_once))
    return torch.cat(losses).cpu().numpy()


def greedy_reference(
    model: Decoder,
    prompt_tokens: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int] = (),
    *,
    kv_cache: KvCache = "auto",
) -> list[int]:
    """Return the most likely continuation, by a whole forward pass for every token.

    This is the plain reference for engines: nothing is kept from one pass to the next, and there is
    no batching. With `kv_cache` int8 every pass rounds keys and values as an engine's cache does.
    At most `max_tokens` ids, never past the model's longest position; the first of `stop_ids` ends
    the answer and is not in it. Equal logits go to the lowest id.
    """
    assert prompt_tokens, "an empty prompt has no next token"
    tokens = list(prompt_tokens)
    answer: list[int] = []
    device = _device(model)
    longest = min(len(tokens) + max_tokens, model.config.max_seq_len)
    hidden = hidden_pass(model, kv_cache, 1, longest)
    with torch.inference_mode():
        while len(answer) < max_tokens and len(tokens) < model.config.max_seq_len:
            hidden_BTC = hidden(torch.tensor([tokens], device=device))
            choice = int(model.head(hidden_BTC[0, -1]).argmax())
            if choice in stop_ids:
                break
            answer.append(choice)
            tokens.append(choice)
    return answer


def hidden_pass(
    model: Decoder, kv_cache: KvCache, batch_size: int, seq_len: int
) -> Callable[[Tensor], Tensor]:
    """Return what gives h_BTC after the final norm of tokens_BT, within these sizes.

    With `kv_cache` int8 attention reads keys and values as a cache rounds them.
    """
    if kv_cache == "auto":
        return model.hidden
    return CachedReading(model, kv_cache, batch_size, seq_len).hidden


def _batch_losses(
    model: Decoder, hidden_BTC: Tensor, targets_BT: Tensor, logits_at_once: int
) -> Tensor:
    # B batch, T tokens, C hidden, N = B * T
    hidden_NC = hidden_BTC.flatten(0, 1)
    targets_N = targets_BT.flatten()
    chunk = max(1, logits_at_once // model.config.vocab_size)
    pieces = [
        cross_entropy(
            model.head(hidden_NC[i : i + chunk]).float(), targets_N[i : i + chunk], reduction="none"
        )
        for i in range(0, len(targets_N), chunk)
    ]
    return torch.cat(pieces).view(targets_BT.shape).double().mean(dim=1)


def _device(model: Decoder) -> torch.device:
    return next(model.parameters()).device
