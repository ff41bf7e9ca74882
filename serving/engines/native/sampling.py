"""The next token of every sequence of a pass, from its logits.

Takes logits and the parameters of each row; gives token ids and log probabilities. It does not know
about sequences or text. One number in [0, 1) decides the draw of a row, so a seeded sequence gets
the same tokens whatever runs beside it.

N rows, V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a softmax is a maximum to double precision, and dividing by it would overflow.
_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class SamplingRow:
    """How one row is sampled; `draw` is uniform in [0, 1)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    draw: float = 0.0


@dataclass(frozen=True)
class Likely:
    """Log probability of a chosen token and the likeliest tokens at its place, best first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def sample(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """Return a token id a row, or None where the logits are not finite (a broken model)."""
    assert logits_NV.shape[0] == len(rows), "one row of logits for each row of parameters"
    best_N, ids_N = logits_NV.max(dim=-1)  # NaN and +inf win every maximum.
    is_valid = best_N.isfinite().tolist()
    tokens: list[int] = ids_N.tolist()
    drawn = [n for n, row in enumerate(rows) if row.temperature >= _GREEDY_BELOW and is_valid[n]]
    if drawn:
        sampled = _draw(logits_NV[drawn], [rows[n] for n in drawn])
        for n, token in zip(drawn, sampled, strict=True):
            tokens[n] = token
    return [token if valid else None for token, valid in zip(tokens, is_valid, strict=True)]


def likelihood(logits_V: Tensor, token_id: int, num_top: int) -> Likely:
    """Return natural log probabilities of the model itself, before temperature and truncation."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    top = logprobs_V.topk(min(num_top, logprobs_V.numel()))
    return Likely(
        float(logprobs_V[token_id]), tuple(top.indices.tolist()), tuple(top.values.tolist())
    )


def _draw(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Sample by the inverse of the cumulative distribution over tokens sorted by probability."""
    device = logits_NV.device
    vocabulary = logits_NV.shape[-1]
    temperature_N1 = torch.tensor(
        [[row.temperature] for row in rows], device=device, dtype=torch.float64
    )
    top_p_N1 = torch.tensor([[row.top_p] for row in rows], device=device, dtype=torch.float64)
    top_k_N1 = torch.tensor([[row.top_k or vocabulary] for row in rows], device=device)
    draw_N1 = torch.tensor([[row.draw] for row in rows], device=device, dtype=torch.float64)

    sorted_NV, ids_NV = logits_NV.double().sort(dim=-1, descending=True, stable=True)
    probability_NV = ((sorted_NV - sorted_NV[:, :1]) / temperature_N1).softmax(dim=-1)
    rank_1V = torch.arange(vocabulary, device=device)[None]
    probability_NV = probability_NV.masked_fill(rank_1V >= top_k_N1, 0.0)
    probability_NV /= probability_NV.sum(dim=-1, keepdim=True)
    before_NV = probability_NV.cumsum(dim=-1) - probability_NV
    probability_NV = probability_NV.masked_fill(before_NV >= top_p_N1, 0.0)
    cumulative_NV = probability_NV.cumsum(dim=-1)
    target_N1 = draw_N1 * cumulative_NV[:, -1:]
    last_N1 = (probability_NV > 0).sum(dim=-1, keepdim=True) - 1
    rank_N1 = torch.searchsorted(cumulative_NV, target_N1, right=True).minimum(last_N1)
    chosen: list[int] = ids_NV.gather(-1, rank_N1)[:, 0].tolist()
    return chosen
