"""One forward pass over the pieces of a batch, and the tokens that follow from it.

Takes pieces of sequences; gives a sampled token for each piece that completes its sequence. It does
not know about queues, threads or text.

B batch (1), T tokens of all pieces, C hidden width, N pieces that are sampled, V vocabulary
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from jobs.kernels.attention import SlotCache, Span
from jobs.models.decoder import Decoder
from serving.engines.native.sampling import Likely, SamplingRow, likelihood, sample
from serving.engines.native.scheduler import Piece
from serving.engines.native.sequence import Sequence


@dataclass(frozen=True)
class Sampled:
    """The token that follows a sequence; None if its logits were not finite."""

    sequence: Sequence
    token_id: int | None
    likely: Likely | None


class Runner:
    """A model with its cache of keys and values."""

    def __init__(self, model: Decoder, cache: SlotCache, device: torch.device) -> None:
        self._model = model.eval()
        self._cache = cache
        self._device = device

    @torch.inference_mode()
    def run(self, pieces: Seq[Piece]) -> list[Sampled]:
        """Write the pieces into the cache and return what follows the complete ones."""
        tokens = [t for p in pieces for t in p.sequence.tokens[p.start : p.start + p.length]]
        positions = [t for p in pieces for t in range(p.start, p.start + p.length)]
        tokens_BT = torch.tensor([tokens], device=self._device)
        positions_BT = torch.tensor([positions], device=self._device)
        attention = self._cache.attention([_span(piece) for piece in pieces])
        hidden_BTC = self._model.hidden(tokens_BT, positions_BT, attention)
        sampled, rows = _last_rows(pieces)
        if not sampled:
            return []
        logits_NV = self._model.head(hidden_BTC[0, rows])
        token_ids = sample(logits_NV, [_row(sequence) for sequence in sampled])
        return [
            Sampled(sequence, token_id, _likely(logits_NV[n], sequence, token_id))
            for n, (sequence, token_id) in enumerate(zip(sampled, token_ids, strict=True))
        ]


def _span(piece: Piece) -> Span:
    slot = piece.sequence.slot
    assert slot is not None, "a scheduled sequence has a slot"
    return Span(slot, piece.start, piece.length)


def _last_rows(pieces: Seq[Piece]) -> tuple[list[Sequence], list[int]]:
    """Return the sequences to sample, and the row of each one's last token."""
    sequences, rows, stop = [], [], 0
    for piece in pieces:
        stop += piece.length
        if piece.is_last:
            sequences.append(piece.sequence)
            rows.append(stop - 1)
    return sequences, rows


def _row(sequence: Sequence) -> SamplingRow:
    request = sequence.request
    draw = sequence.draws.random() if request.temperature > 0 else 0.0
    return SamplingRow(request.temperature, request.top_p, request.top_k, draw)


def _likely(logits_V: torch.Tensor, sequence: Sequence, token_id: int | None) -> Likely | None:
    num_top = sequence.request.num_logprobs
    if num_top is None or token_id is None:
        return None
    return likelihood(logits_V, token_id, num_top)
