"""One pass of transformers' own model code over the pieces of a batch.

Takes pieces of sequences; gives a token for each piece that completes its sequence. The scheduling,
sampling and answering around it are the native engine's. It does not know about queues or text.

N pieces that are sampled, V vocabulary
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from serving.engines.native.passes import Piece
from serving.engines.native.runner import Sampled, choose
from serving.engines.native.sequence import Sequence, State
from serving.engines.transformers.adapters import Adapters
from serving.engines.transformers.rows import Rows


class TransformersRunner:
    """Carries out passes: new prompts one by one, then all sequences that go on, together."""

    def __init__(self, rows: Rows, adapters: Adapters) -> None:
        self._rows = rows
        self._adapters = adapters
        self._begun: set[Sequence] = set()

    @torch.inference_mode()
    def run(self, pieces: Seq[Piece]) -> list[Sampled]:
        """Compute the pieces and return what follows the complete ones."""
        # A preempted one is read anew: its rows would keep the batch they lie in alive.
        self._forget(s for s in self._begun if s.state is not State.RUNNING)
        logits: dict[Sequence, Tensor] = {}
        going_on = [p for p in pieces if p.length == 1 and p.start > 0]
        for piece in pieces:
            if piece not in going_on:
                logits[piece.sequence] = self._read(piece)
        for adapter in dict.fromkeys(piece.sequence.request.adapter for piece in going_on):
            chosen = [p.sequence for p in going_on if p.sequence.request.adapter == adapter]
            tokens = [p.sequence.tokens[p.start] for p in going_on if p.sequence in chosen]
            self._adapters.use(adapter)
            stepped_NV = self._rows.step(chosen, tokens)
            logits |= {s: stepped_NV[n : n + 1] for n, s in enumerate(chosen)}
        complete = [piece for piece in pieces if piece.is_last]
        if not complete:
            return []
        logits_NV = torch.cat([logits[piece.sequence] for piece in complete])
        return choose(logits_NV, [(piece, []) for piece in complete])

    def _read(self, piece: Piece) -> Tensor:
        """Compute tokens of a prompt, or of a preempted sequence, and return logits_1V."""
        sequence = piece.sequence
        tokens = sequence.tokens[piece.start : piece.stop]
        self._adapters.use(sequence.request.adapter)
        if piece.start > 0:
            return self._rows.extend(sequence, tokens)
        self._begun.add(sequence)
        return self._rows.begin(sequence, tokens)

    def _forget(self, sequences: Iterable[Sequence]) -> None:
        ended = list(sequences)
        self._rows.forget(ended)
        self._begun.difference_update(ended)
