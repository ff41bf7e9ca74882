"""The native engine: one thread that advances all sequences, one pass after another.

Takes requests from any event loop; gives each its chunks as they are computed. It does not know
about HTTP, Ray or where the model came from.

Only the engine's thread touches scheduler, model and sequences. The others reach it through one
queue of commands, and it reaches them through mailboxes.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import EngineError, RequestError
from serving.engines._protocol import Chunk, EngineInfo, EngineStats, GenerateRequest
from serving.engines.native.answers import Vocabulary, append, resume
from serving.engines.native.checks import check_request
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.drafting import Drafting
from serving.engines.native.engine_thread import EngineThread, Work
from serving.engines.native.mailbox import Letter, Mailbox, deliver
from serving.engines.native.passes import Piece
from serving.engines.native.runner import Sampled
from serving.engines.native.sampling import SamplingState
from serving.engines.native.scheduler import Scheduler
from serving.engines.native.sequence import Sequence


class Passes(Protocol):
    """Carries out passes; see `serving.engines.native.runner.Runner`."""

    def run(self, pieces: Seq[Piece]) -> list[Sampled]:
        """Return what follows the pieces that complete their sequence."""
        ...


@dataclass(frozen=True)
class _Add:
    sequence: Sequence


@dataclass(frozen=True)
class _Cancel:
    sequence: Sequence


@dataclass
class _Totals:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_ticks: int = 0
    cached_prompt_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    settled_tokens: int = 0  # Of those submitted: computed, or not needed any more.


class NativeEngine:
    """Continuous batching over one model; see `serving.engines._protocol.Engine`."""

    def __init__(
        self,
        runner: Passes,
        scheduler: Scheduler,
        info: EngineInfo,
        vocabulary: Vocabulary,
        max_drafts: int = 0,
    ) -> None:
        """Start the engine's thread."""
        self._runner = runner
        self._scheduler = scheduler
        self._info = info
        self._vocabulary = vocabulary
        self._max_drafts = max_drafts
        self._totals = _Totals()
        self._submitted_tokens = 0
        self._lock = threading.Lock()  # Guards `_submitted_tokens`.
        self._thread = EngineThread(
            "native-engine",
            Work(lambda: scheduler.is_idle, self._take, self._tick, self._end),
        )

    def info(self) -> EngineInfo:
        """Return what this engine runs."""
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish reason; closing the iterator cancels the work."""
        mailbox = Mailbox(asyncio.get_running_loop())
        if request.grammar is None and not request.resumed_tokens:
            sequence = self._sequence(request, mailbox)
        else:  # Compiling a grammar may take seconds, and so may going over many tokens.
            sequence = await asyncio.to_thread(self._sequence, request, mailbox)
        chunk = resume(sequence)
        if chunk is not None:
            yield chunk
            return
        self._submit(sequence)
        is_done = False
        try:
            while not is_done:
                chunk = await mailbox.take()
                is_done = chunk.finish_reason is not None
                yield chunk
        except (EngineError, RequestError):
            is_done = True
            raise
        finally:
            if not is_done:
                self._thread.send(_Cancel(sequence))

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        self._thread.check()
        totals, scheduler = self._totals, self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_slots=scheduler.num_free_slots,
            prompt_tokens=totals.prompt_tokens,
            generated_tokens=totals.generated_tokens,
            num_ticks=totals.num_ticks,
            tokens_in_flight=max(0, self._submitted_tokens - totals.settled_tokens),
            queue_age_s=scheduler.queue_age_s,
            num_blocks=scheduler.blocks.num_blocks,
            num_used_blocks=scheduler.blocks.num_used,
            cached_prompt_tokens=totals.cached_prompt_tokens,
            num_preemptions=scheduler.num_preemptions,
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
        )

    def close(self) -> None:
        """Stop the thread; sequences that still run end with EngineError."""
        self._thread.close()

    def _sequence(self, request: GenerateRequest, mailbox: Mailbox) -> Sequence:
        max_tokens = check_request(request, self._info, self._vocabulary)
        return Sequence(
            request,
            max_tokens,
            Detokenizer(
                self._vocabulary.decoder,
                request.prompt_tokens,
                request.stop,
                request.resumed_tokens,
            ),
            SamplingState.create(request, self._vocabulary.sampling),
            mailbox,
            Drafting(self._max_drafts),
        )

    def _submit(self, sequence: Sequence) -> None:
        sequence.num_counted = sequence.num_owed
        with self._lock:
            self._submitted_tokens += sequence.num_counted
        self._thread.submit(_Add(sequence))

    # What follows runs on the engine's thread.

    def _take(self, command: _Add | _Cancel) -> None:
        if isinstance(command, _Add):
            self._scheduler.add(command.sequence)
        else:
            self._scheduler.cancel(command.sequence)
            self._settle(command.sequence)

    def _tick(self) -> None:
        pieces = self._scheduler.schedule()
        sampled = self._runner.run(pieces)
        deliver(self._postprocess(pieces, sampled))

    def _postprocess(self, pieces: Seq[Piece], sampled: Seq[Sampled]) -> Iterator[Letter]:
        """Bring sequences to where the pass took them; yield what their readers get."""
        totals = self._totals
        totals.num_ticks += 1
        for piece in pieces:
            totals.prompt_tokens += max(0, min(piece.stop, piece.sequence.num_prompt) - piece.start)
            if not piece.is_last:
                self._scheduler.advance(piece)
                self._settle(piece.sequence)
        for result in sampled:
            yield self._answer(result)

    def _answer(self, result: Sampled) -> Letter:
        sequence = result.piece.sequence
        if not result.token_ids:
            return sequence.mailbox, self._fail(sequence)
        num_accepted = len(result.token_ids) - 1
        chunk = append(sequence, result.token_ids, result.likely, self._vocabulary)
        sequence.drafting.note(result.num_guessed, num_accepted)
        self._scheduler.advance(result.piece, num_accepted)
        if chunk.finish_reason is not None:
            self._scheduler.finish(sequence)
        self._settle(sequence)
        totals = self._totals
        totals.generated_tokens += len(chunk.token_ids)
        totals.drafted_tokens += result.num_guessed
        totals.accepted_tokens += num_accepted
        totals.cached_prompt_tokens += chunk.cached_tokens  # Only the first chunk has some.
        return sequence.mailbox, chunk

    def _fail(self, sequence: Sequence) -> EngineError | RequestError:
        self._scheduler.cancel(sequence)
        self._settle(sequence)
        if sequence.sampling.failure is not None:
            return RequestError(sequence.sampling.failure)
        return EngineError("the model computed values that are not finite.")

    def _settle(self, sequence: Sequence) -> None:
        """Take what a sequence no longer needs off the tokens in flight."""
        num_owed = sequence.num_owed
        self._totals.settled_tokens += sequence.num_counted - num_owed
        sequence.num_counted = num_owed

    def _end(self, failure: EngineError, commands: list[_Add | _Cancel]) -> None:
        sequences = self._scheduler.cancel_all()
        sequences += [command.sequence for command in commands if isinstance(command, _Add)]
        # One each: an exception that many raise collects the traceback of all of them.
        deliver((sequence.mailbox, EngineError(failure.message)) for sequence in sequences)
