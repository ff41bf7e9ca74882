"""Who guesses tokens ahead of the model: the text itself, or a small model.

Takes the pieces of a pass; gives guesses for what follows each of them. A guess changes how many
tokens a pass yields, never which ones. It does not know how guesses are checked.

B batch (1), T tokens, C hidden width
"""

from collections.abc import Sequence as Seq
from itertools import accumulate

import torch

from jobs.kernels.block_cache import BlockCache
from serving.engines.native.passes import Piece
from serving.engines.native.runner import Chunked, Model, read


class NgramDrafter:
    """Guesses that what followed the last words before follows them again."""

    def propose(self, pieces: Seq[Piece]) -> list[list[int]]:
        """Return up to `max_drafts` guesses for what follows each piece."""
        return [
            piece.sequence.drafting.ngrams.guess(piece.sequence.tokens, piece.max_drafts)
            if piece.max_drafts
            else []
            for piece in pieces
        ]


class ModelDrafter:
    """Guesses what a small model finds likeliest, one token after another.

    Its cache has the shape of the model's own: a sequence's blocks have the same numbers in both.
    Prompts are read here as they are there; what was decoded while nothing was guessed is not, so
    of a prefix that is found there, the end may have to be read here first.
    """

    def __init__(
        self, model: Model, cache: BlockCache, device: torch.device, max_tokens: int
    ) -> None:
        """Take a model and a cache; a sequence that fell behind reads `max_tokens` a pass."""
        self._model = model
        self._cache = cache
        self._device = device
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def propose(self, pieces: Seq[Piece]) -> list[list[int]]:
        """Return up to `max_drafts` guesses for what follows each piece."""
        guesses: list[list[int]] = [[] for _ in pieces]
        # A decoding sequence that nothing may be guessed for is read when something may.
        places = [n for n, piece in enumerate(pieces) if piece.max_drafts or piece.length > 1]
        parts = [self._unread(pieces[place]) for place in places]
        while parts:
            for place, part, token in zip(places, parts, self._following(parts), strict=True):
                stop = part.start + len(part.tokens)
                part.sequence.drafting.num_draft_cached = stop
                piece = pieces[place]
                if piece.max_drafts and stop == piece.stop + len(guesses[place]):
                    guesses[place].append(token)
            places = [n for n in places if 0 < len(guesses[n]) < pieces[n].max_drafts]
            parts = [_last_guess(pieces[place], guesses[place]) for place in places]
        return guesses

    def _unread(self, piece: Piece) -> Chunked:
        sequence = piece.sequence
        # Behind what the model has verified lie guesses that did not hold.
        start = min(sequence.drafting.num_draft_cached, piece.start)
        stop = min(piece.stop, start + self._max_tokens)
        return Chunked(sequence, start, sequence.tokens[start:stop])

    def _following(self, parts: Seq[Chunked]) -> list[int]:
        """Return the likeliest token after each part."""
        last_rows = [stop - 1 for stop in accumulate(len(part.tokens) for part in parts)]
        hidden_NC = read(self._model, self._cache, parts, self._device, wanted=last_rows)
        token_ids: list[int] = self._model.head(hidden_NC).argmax(dim=-1).tolist()
        return token_ids


def _last_guess(piece: Piece, guess: list[int]) -> Chunked:
    return Chunked(piece.sequence, piece.stop + len(guess) - 1, guess[-1:])
