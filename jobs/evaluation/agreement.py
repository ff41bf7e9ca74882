"""How often two models choose the same next token.

Takes two models and the beginnings of texts; gives the share of positions at which both choose
alike, for every prompt. It does not know the limit, nor where the texts come from.

K prompts, P tokens of a prompt, T tokens of a continuation, N tokens of a pass (B = 1)
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.config import KvCache
from jobs.evaluation.cached import SequenceCache
from jobs.evaluation.quality import hidden_pass
from jobs.kernels.block_cache import BlockSpan
from jobs.models._fused import FusedDecoder, can_fuse
from jobs.models.decoder import Decoder

_TOKENS_AT_ONCE = 2048


def greedy_agreement(
    base: Decoder,
    model: Decoder,
    prompts_KP: NDArray[np.int64],
    num_tokens: int,
    kv_caches: tuple[KvCache, KvCache] = ("auto", "auto"),
) -> NDArray[np.float64]:
    """Return the share of equal greedy choices along the base's own continuation, for K prompts.

    The base continues every prompt greedily by `num_tokens`; then both models read prompt and
    continuation in one pass, so that one different choice is counted once and not all that would
    follow from it. A copy agrees everywhere: both choices come from the same kind of pass. Of
    `kv_caches`, the base's and the model's, each is read through as an engine keeps it.
    """
    assert prompts_KP.ndim == 2, f"expected [K, P] token ids, found shape {prompts_KP.shape}"
    device = base.model.embed_tokens.weight.device
    rows_KP = torch.from_numpy(np.ascontiguousarray(prompts_KP)).to(device, torch.long)
    with torch.inference_mode():
        rows_KN = torch.cat(
            [rows_KP, continue_greedily(base, rows_KP, num_tokens, kv_caches[0])], dim=1
        )
        theirs_KT = _choices(base, rows_KN, num_tokens, kv_caches[0])
        ours_KT = _choices(model, rows_KN, num_tokens, kv_caches[1])
    return (ours_KT == theirs_KT).double().mean(dim=1).cpu().numpy()


def continue_greedily(
    model: Decoder, prompts_KP: Tensor, num_tokens: int, kv_cache: KvCache = "auto"
) -> Tensor:
    """Return each prompt's most likely continuation [K, T], all of them a token further a step."""
    num_prompts, length = prompts_KP.shape
    device = prompts_KP.device
    forward = FusedDecoder(model) if can_fuse(model) else model
    cache = SequenceCache(model, kv_cache, num_prompts, length + num_tokens)

    def choose(tokens_1N: Tensor, spans: Sequence[BlockSpan]) -> Tensor:
        positions = [torch.arange(span.start, span.stop, device=device) for span in spans]
        attention = cache.blocks.attention(spans)
        hidden_1NC = forward.hidden(tokens_1N, torch.cat(positions)[None], attention)
        last = torch.tensor([span.length for span in spans], device=device).cumsum(0) - 1
        return forward.head(hidden_1NC[0, last]).argmax(dim=-1)

    step = max(1, _TOKENS_AT_ONCE // length)
    first = [
        choose(
            prompts_KP[at : at + step].reshape(1, -1),
            [cache.span(row, 0, length) for row in range(at, min(at + step, num_prompts))],
        )
        for at in range(0, num_prompts, step)
    ]
    chosen = [torch.cat(first)]
    for place in range(length, length + num_tokens - 1):
        spans = [cache.span(row, place, 1) for row in range(num_prompts)]
        chosen.append(choose(chosen[-1][None], spans))
    return torch.stack(chosen, dim=1)


def _choices(model: Decoder, rows_KN: Tensor, num_tokens: int, kv_cache: KvCache) -> Tensor:
    """Return the choices [K, T] for the last tokens of every row, given what precedes each."""
    step = max(1, _TOKENS_AT_ONCE // rows_KN.shape[1])
    hidden = hidden_pass(model, kv_cache, min(step, len(rows_KN)), rows_KN.shape[1] - 1)
    return torch.cat(
        [
            model.head(hidden(rows[:, :-1])[:, -num_tokens:]).argmax(dim=-1)
            for rows in rows_KN.split(step)
        ]
    )
