"""What a caller gets of the tokens that were sampled: text, where the answer ends and why.

Takes sampled tokens; adds them to their sequence and gives the chunk for its reader. It does not
know about batches, threads or the cache.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from cluster.errors import RequestError
from serving.engines._protocol import Alternative, Chunk, FinishReason, TokenLogprob
from serving.engines.native.detokenizer import TextDecoder
from serving.engines.native.sampling import Likely, TokenizerInfo
from serving.engines.native.sequence import Sequence


@dataclass(frozen=True)
class Vocabulary:
    """What an engine knows of its tokens; without a `decoder` chunks carry token ids only."""

    sampling: TokenizerInfo
    decoder: TextDecoder | None = None
    stop_ids: frozenset[int] = field(default=frozenset())


def resume(sequence: Sequence) -> Chunk | None:
    """Return the last chunk if nothing may follow the resumed tokens of a sequence, else None.

    Raises RequestError if there are more of them than were asked for.
    """
    resumed = sequence.request.resumed_tokens
    if sequence.num_generated > sequence.max_tokens:
        raise RequestError(
            f"`resumed_tokens` has {len(resumed)} tokens; at most {sequence.max_tokens} were "
            "asked for."
        )
    if not resumed:
        return None
    text, reason = _end_of(sequence)
    return None if reason is None else Chunk(text, (), reason)


def append(
    sequence: Sequence, token_ids: Seq[int], likely: Seq[Likely], vocabulary: Vocabulary
) -> Chunk:
    """Add tokens to a sequence, up to the one that ends it; an end token is no part of it."""
    detokenizer = sequence.detokenizer
    kept: list[int] = []
    texts: list[str] = []
    reason = None
    for token_id in token_ids:
        if token_id in vocabulary.stop_ids and not sequence.request.ignore_eos:
            texts.append(detokenizer.finish())
            reason = FinishReason.STOP
            break
        sequence.tokens.append(token_id)
        kept.append(token_id)
        texts.append(detokenizer.push(token_id))
        if detokenizer.is_stopped or sequence.num_generated == sequence.max_tokens:
            break
    if reason is None:
        held_text, reason = _end_of(sequence)
        texts.append(held_text)
    cached = 0 if sequence.is_answered else sequence.num_reused or 0
    sequence.is_answered = True
    logprobs = _logprobs(kept, likely, vocabulary.decoder) if likely else ()
    return Chunk("".join(texts), tuple(kept), reason, logprobs, cached)


def _end_of(sequence: Sequence) -> tuple[str, FinishReason | None]:
    """Return the text held back and the reason if a sequence ends with its last token."""
    if sequence.detokenizer.is_stopped:
        return "", FinishReason.STOP
    is_full = sequence.num_generated == sequence.max_tokens
    if not is_full and not sequence.sampling.is_complete:
        return "", None
    text = sequence.detokenizer.finish()
    if sequence.detokenizer.is_stopped or sequence.sampling.is_complete:
        return text, FinishReason.STOP
    return text, FinishReason.LENGTH


def _logprobs(
    token_ids: Seq[int], likely: Seq[Likely], decoder: TextDecoder | None
) -> tuple[TokenLogprob, ...]:
    def text_of(token_id: int) -> str:
        return "" if decoder is None else decoder.decode([token_id])

    return tuple(
        TokenLogprob(
            token_id,
            text_of(token_id),
            place.logprob,
            tuple(
                Alternative(other, text_of(other), logprob)
                for other, logprob in zip(place.top_ids, place.top_logprobs, strict=True)
            ),
        )
        for token_id, place in zip(token_ids, likely, strict=False)
    )
