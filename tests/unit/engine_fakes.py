"""Sequences and passes without a model, for tests of the native engine's bookkeeping."""

from serving.engines._protocol import GenerateRequest
from serving.engines.native.answers import Vocabulary, append
from serving.engines.native.blocks import BlockManager
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.drafting import Drafting
from serving.engines.native.passes import PassLimits
from serving.engines.native.runner import Sampled
from serving.engines.native.sampling import SamplingState, TokenizerInfo
from serving.engines.native.scheduler import Scheduler
from serving.engines.native.sequence import Sequence

VOCABULARY = Vocabulary(TokenizerInfo(1000))


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def sequence(num_prompt: int, max_tokens: int = 4, *, drafts: int = 0, **options) -> Sequence:
    """A sequence whose prompt nobody else has, unless `prompt_tokens` are given."""
    sequence.count += 1
    prompt = tuple((sequence.count * 1000 + place) for place in range(num_prompt))
    request = GenerateRequest(**{"prompt_tokens": prompt, **options})
    state = SamplingState.create(request, VOCABULARY.sampling)
    return Sequence(request, max_tokens, Detokenizer(None), state, None, Drafting(drafts))


sequence.count = 0


def scheduler_with(
    sequences: list[Sequence],
    slots: int = 4,
    tokens: int = 8,
    blocks: BlockManager | None = None,
    **limits,
) -> Scheduler:
    size = PassLimits(slots, max(tokens, slots), **limits)
    scheduler = Scheduler(size, blocks or BlockManager(1000, 4), Clock())
    for each in sequences:
        scheduler.add(each)
    return scheduler


def advance(scheduler: Scheduler, token_id: int = 0) -> list[tuple[Sequence, int, int]]:
    """Carry out one pass as the engine does, without guesses; return what ran."""
    pieces = scheduler.schedule()
    for piece in pieces:
        if not piece.is_last:
            scheduler.advance(piece)
            continue
        result = Sampled(piece, [token_id])
        chunk = append(piece.sequence, result.token_ids, (), VOCABULARY)
        scheduler.advance(piece)
        if chunk.finish_reason is not None:
            scheduler.finish(piece.sequence)
    return [(piece.sequence, piece.start, piece.length) for piece in pieces]


def run_all(scheduler: Scheduler, most: int = 10_000) -> int:
    """Carry out passes until nothing is left; return how many."""
    for num_passes in range(most):
        if scheduler.is_idle:
            return num_passes
        assert advance(scheduler), "a pass without work would never end"
    raise AssertionError(f"not done after {most} passes")
