"""One forward pass over the pieces of a batch, and the tokens that follow from it.

Takes pieces of sequences; gives what follows each piece that completes its sequence: one token, or
several where guesses held. It does not know about queues, threads or text.

B batch (1), T tokens of all pieces, C hidden width, N rows that are sampled, V vocabulary
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from jobs.config import DecoderConfig
from jobs.kernels.attention import Attention
from jobs.kernels.block_cache import BlockCache, BlockSpan
from jobs.models.decoder import RowAdapters
from serving.engines.native.adapters import Adapters
from serving.engines.native.passes import Piece
from serving.engines.native.sampling import Likely, likelihood, sample
from serving.engines.native.sequence import Sequence


class Model(Protocol):
    """A decoder as a pass needs it; see `jobs.models.decoder.Decoder` and `FusedDecoder`."""

    config: DecoderConfig

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attention: Attention,
        adapters: RowAdapters | None = None,
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """Return h_BTC after the final norm, or h_BNC of tokens at rising places."""
        ...

    def head(self, h: Tensor) -> Tensor:
        """Return float32 logits [..., V] of final hidden states [..., C]."""
        ...


class Drafter(Protocol):
    """Guesses tokens that the model then checks."""

    def propose(self, pieces: Seq[Piece]) -> list[list[int]]:
        """Return up to `max_drafts` guesses for what follows each piece of a pass."""
        ...


class Replays(Protocol):
    """Passes that need not be started operator by operator; see `graphs.DecodeGraphs`."""

    def run(self, parts: "Seq[Chunked]") -> Tensor | None:
        """Compute parts as `read` does; None for a pass of another kind."""
        ...


@dataclass(frozen=True, slots=True)
class Sampled:
    """What follows a piece; empty if none can be chosen, because its logits are not finite.

    All tokens but the last are guesses that held, of `num_guessed`. `likely` is as long as
    `token_ids`, or empty.
    """

    piece: Piece
    token_ids: list[int]
    num_guessed: int = 0
    likely: tuple[Likely, ...] = ()


class Chunked(NamedTuple):
    """Tokens [start, start + len(tokens)) of a sequence, guesses included, as a model reads it."""

    sequence: Sequence
    start: int
    tokens: list[int]


def read(
    model: Model,
    cache: BlockCache,
    parts: Seq[Chunked],
    device: torch.device,
    adapters: RowAdapters | None = None,
    wanted: Seq[int] | None = None,
) -> Tensor:
    """Compute parts of sequences, write them into the cache and return their h_TC.

    With `wanted`, rising places of tokens, only these tokens' h_NC.
    """
    tokens = [token for part in parts for token in part.tokens]
    positions = [at for p in parts for at in range(p.start, p.start + len(p.tokens))]
    attention = cache.attention(
        [BlockSpan(tuple(p.sequence.blocks), p.start, len(p.tokens)) for p in parts]
    )
    tokens_BT = torch.tensor([tokens], device=device)
    positions_BT = torch.tensor([positions], device=device)
    wanted_N = None if wanted is None else torch.tensor(wanted, dtype=torch.int64, device=device)
    return model.hidden(tokens_BT, positions_BT, attention, adapters, wanted_N)[0]


class Runner:
    """A model with its cache of keys and values, its adapters, and who guesses ahead of it."""

    def __init__(
        self,
        model: Model,
        cache: BlockCache,
        device: torch.device,
        drafter: Drafter | None = None,
        adapters: Adapters | None = None,
        replays: Replays | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._drafter = drafter
        self._adapters = adapters
        self._replays = replays

    @torch.inference_mode()
    def run(self, pieces: Seq[Piece]) -> list[Sampled]:
        """Write the pieces into the cache and return what follows the complete ones."""
        guesses = [[]] * len(pieces) if self._drafter is None else self._drafter.propose(pieces)
        parts = [_part(piece, guess) for piece, guess in zip(pieces, guesses, strict=True)]
        adapters = self._adapters_of(parts)
        rows = _sampled_rows(pieces, parts)
        hidden_NC = None
        if self._replays is not None and adapters is None:
            hidden_TC = self._replays.run(parts)
            hidden_NC = None if hidden_TC is None else hidden_TC[rows]
        if hidden_NC is None:
            hidden_NC = read(self._model, self._cache, parts, self._device, adapters, rows)
        checked = [(p, guess) for p, guess in zip(pieces, guesses, strict=True) if p.is_last]
        if not checked:
            return []
        logits_NV = self._model.head(hidden_NC)
        return choose(logits_NV, checked)

    def _adapters_of(self, parts: Seq[Chunked]) -> RowAdapters | None:
        if self._adapters is None:
            return None
        names = [part.sequence.request.adapter for part in parts]
        return self._adapters.batch(names, [len(part.tokens) for part in parts])


def _part(piece: Piece, guess: list[int]) -> Chunked:
    tokens = piece.sequence.tokens[piece.start : piece.start + piece.length]
    return Chunked(piece.sequence, piece.start, tokens + guess)


def _sampled_rows(pieces: Seq[Piece], parts: Seq[Chunked]) -> list[int]:
    """Return the rows of each complete sequence's last token and of all guesses behind it."""
    rows: list[int] = []
    first = 0
    for piece, part in zip(pieces, parts, strict=True):
        stop = first + len(part.tokens)
        if piece.is_last:
            rows.extend(range(first + piece.length - 1, stop))
        first = stop
    return rows


def choose(logits_NV: Tensor, checked: Seq[tuple[Piece, list[int]]]) -> list[Sampled]:
    """Return the tokens that would have been sampled one by one.

    Each place has its own draw, so a guess that equals what its place's row gives is what would
    have been sampled, and the row behind it is then the right one.
    """
    rows = [
        row
        for piece, guess in checked
        for row in piece.sequence.sampling.rows(_draws(piece.sequence, len(guess) + 1), guess)
    ]
    token_ids = sample(logits_NV, rows)
    results = []
    first = 0
    for piece, guess in checked:
        stop = first + len(guess) + 1
        taken = _take(piece.sequence, token_ids[first:stop], guess)
        likely = _likely(logits_NV[first:stop], piece.sequence, taken)
        results.append(Sampled(piece, taken, len(guess), likely))
        first = stop
    return results


def _draws(sequence: Sequence, num: int) -> list[float]:
    if sequence.request.temperature == 0:
        return [0.0] * num
    first = sequence.num_generated
    return [sequence.draw(index) for index in range(first, first + num)]


def _take(sequence: Sequence, token_ids: Seq[int | None], guess: Seq[int]) -> list[int]:
    """Accept tokens up to the first that was not guessed, or that ends the sequence's grammar."""
    taken: list[int] = []
    for place, token_id in enumerate(token_ids):
        if token_id is None:
            break
        taken.append(token_id)
        sequence.sampling.accept(token_id)
        is_guessed = place < len(guess) and guess[place] == token_id
        if not is_guessed or sequence.sampling.is_complete:
            break
    return taken


def _likely(logits_NV: Tensor, sequence: Sequence, taken: Seq[int]) -> tuple[Likely, ...]:
    num_top = sequence.request.num_logprobs
    if num_top is None:
        return ()
    return tuple(likelihood(logits_NV[n], token, num_top) for n, token in enumerate(taken))
