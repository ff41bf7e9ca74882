"""Tokens drawn from rows of logits: greedily, or by the inverse of a cumulative distribution.

Takes logits and how each row is cut; gives token ids. It does not know where the parameters or the
draws come from. No step mixes rows, and none sorts a vocabulary where it can be avoided.

N rows, V vocabulary, L blocks of a vocabulary, B tokens of a block, S places
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import native, native_ops
from serving.engines.native.penalties import LogitEdit

# Below this a softmax is a maximum to double precision, and dividing by it would overflow.
_GREEDY_BELOW = 1e-6
# A maximum or sum over a vocabulary is taken in blocks, which is what vector units are fast at.
_BLOCK = 128

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingRow:
    """How one row is sampled; `draw` is uniform in [0, 1), `edits` change the logits before."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    draw: float = 0.0
    min_p: float = 0.0
    edits: tuple[LogitEdit, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the draw."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1


def find_best(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row and its lowest id; NaN is larger than any number."""
    vocab_size = logits_NV.shape[-1]
    is_plain = logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32
    if is_plain and logits_NV.is_contiguous() and native.is_available():
        return native_ops.find_best(logits_NV)
    if vocab_size % _BLOCK:
        best_N, ids_N = logits_NV.max(dim=-1)
        return best_N, ids_N
    blocks_NLB = logits_NV.reshape(len(logits_NV), -1, _BLOCK)
    best_N, block_N = blocks_NLB.amax(dim=-1).max(dim=-1)
    rows_N = torch.arange(len(block_N), device=block_N.device)
    return best_N, block_N * _BLOCK + blocks_NLB[rows_N, block_N].argmax(dim=-1)


def draw_tokens(logits_NV: Tensor, best_N: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Sample rows that are not greedy by the inverse of their cumulative distribution."""
    device = logits_NV.device
    temperature_N1 = torch.tensor([[row.temperature] for row in rows], device=device)
    probability_NV = ((logits_NV.float() - best_N[:, None]) / temperature_N1).softmax(dim=-1)
    if any(row.min_p > 0 for row in rows):
        min_p_N1 = torch.tensor([[row.min_p] for row in rows], device=device)
        least_N1 = min_p_N1 * probability_NV.amax(dim=-1, keepdim=True)
        probability_NV.masked_fill_(probability_NV < least_N1, 0.0)
    tokens = [0] * len(rows)
    cut = [n for n, row in enumerate(rows) if row.top_k is not None or row.top_p < 1]
    whole = [n for n, row in enumerate(rows) if row.top_k is None and row.top_p == 1]
    for chosen, draw_from in ((cut, _draw_cut), (whole, _draw_any)):
        if chosen:
            selected_NV = probability_NV if len(chosen) == len(rows) else probability_NV[chosen]
            drawn = draw_from(selected_NV, [rows[n] for n in chosen])
            for n, token in zip(chosen, drawn, strict=True):
                tokens[n] = token
    return tokens


def _draw_any(probability_NV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw from whole rows: first a block of the vocabulary, then a token within it."""
    padding = -probability_NV.shape[-1] % _BLOCK
    if padding:
        probability_NV = functional.pad(probability_NV, (0, padding))
    blocks_NLB = probability_NV.reshape(len(rows), -1, _BLOCK)
    draw_N1 = _column([row.draw for row in rows], probability_NV.device)
    sums_NL = blocks_NLB.sum(dim=-1, dtype=torch.float64)
    block_N1, rest_N1 = _invert(sums_NL, draw_N1 * sums_NL.sum(dim=-1, keepdim=True))
    rows_N = torch.arange(len(rows), device=probability_NV.device)
    place_N1, _ = _invert(blocks_NLB[rows_N, block_N1[:, 0]].double(), rest_N1)
    tokens: list[int] = (block_N1 * _BLOCK + place_N1)[:, 0].tolist()
    return tokens


def _draw_cut(probability_NV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw from rows cut by top-k or top-p; of equally likely tokens the lower ids are kept."""
    if probability_NV.device.type != "cpu":
        return draw_sorted(probability_NV, rows)
    return [_draw_from_few(p_V, row) for p_V, row in zip(probability_NV.numpy(), rows, strict=True)]


def _draw_from_few(probability_V: Array, row: SamplingRow) -> int:
    """Draw one token, sorting only those that are likely enough to be kept."""
    total, least = probability_V.sum(dtype=np.float64), np.finfo(np.float32).tiny
    if row.top_k is not None:
        least = max(least, _bound_of_top_k(probability_V, row.top_k))
    else:
        # All V tokens below this together have less than what top-p may leave out.
        least = max(least, np.float32((1 - row.top_p) * total / len(probability_V)))
    ids = np.flatnonzero(probability_V >= least)
    few = probability_V[ids]
    sorted_few = np.sort(few)[::-1][: row.top_k]
    cumulative = sorted_few.cumsum(dtype=np.float64)
    kept = row.top_p * (total if row.top_k is None else cumulative[-1])
    num_kept = min(int(cumulative.searchsorted(kept)) + 1, len(sorted_few))
    is_kept = few > sorted_few[num_kept - 1]
    ties = np.flatnonzero(few == sorted_few[num_kept - 1])
    is_kept[ties[: num_kept - np.count_nonzero(is_kept)]] = True
    cumulative = few[is_kept].cumsum(dtype=np.float64)
    place = int(cumulative.searchsorted(row.draw * cumulative[-1], side="right"))
    return int(ids[is_kept][min(place, num_kept - 1)])


def _bound_of_top_k(probability_V: Array, top_k: int) -> np.float32:
    """Return a number that at least `top_k` tokens reach, and preferably few more."""
    vocab_size, num_blocks = len(probability_V), len(probability_V) // _BLOCK
    if top_k >= vocab_size:
        return np.float32(0.0)
    if top_k > num_blocks:
        return np.float32(np.partition(probability_V, -top_k)[-top_k])
    best_L = probability_V[: num_blocks * _BLOCK].reshape(num_blocks, _BLOCK).max(axis=1)
    return np.float32(np.partition(best_L, -top_k)[-top_k])


def draw_sorted(probability_NV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw from rows cut by top-k or top-p by sorting them whole, which is fast on a GPU."""
    device, vocab_size = probability_NV.device, probability_NV.shape[-1]
    sorted_NV, ids_NV = probability_NV.sort(dim=-1, descending=True, stable=True)
    top_k_N1 = _column([row.top_k or vocab_size for row in rows], device)
    rank_1V = torch.arange(vocab_size, device=device)[None]
    weight_NV = sorted_NV.double().masked_fill(rank_1V >= top_k_N1, 0.0)
    cumulative_NV = weight_NV.cumsum(dim=-1)
    kept_N1 = _column([row.top_p for row in rows], device) * cumulative_NV[:, -1:]
    weight_NV.masked_fill_(cumulative_NV - weight_NV >= kept_N1, 0.0)
    draw_N1 = _column([row.draw for row in rows], device)
    rank_N1, _ = _invert(weight_NV, draw_N1 * weight_NV.sum(dim=-1, keepdim=True))
    tokens: list[int] = ids_NV.gather(-1, rank_N1)[:, 0].tolist()
    return tokens


def _invert(weight_NS: Tensor, target_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Return where cumulated weights pass a target, and what of the target is left there.

    It is always a place whose weight is not 0, whatever rounding does to the sums.
    """
    cumulative_NS = weight_NS.cumsum(dim=-1)
    places_1S = torch.arange(weight_NS.shape[-1], device=weight_NS.device)[None]
    last_N1 = (places_1S * (weight_NS > 0)).amax(dim=-1, keepdim=True)
    place_N1 = torch.searchsorted(cumulative_NS, target_N1, right=True).minimum(last_N1)
    before_N1 = (cumulative_NS - weight_NS).gather(-1, place_N1)
    return place_N1, (target_N1 - before_N1).clamp_min(0.0)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
