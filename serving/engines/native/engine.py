"""The native engine: one thread that advances all sequences, one pass after another.

Takes requests from any event loop; gives each its chunks as they are computed. It does not know
about HTTP, Ray or where the model came from.

Only the engine's thread touches scheduler, model and sequences. The others reach it through one
queue of commands, and it reaches them through each sequence's `deliver`.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from queue import SimpleQueue

from cluster.errors import ContextLengthError, EngineError, RequestError
from serving.engines._protocol import (
    Alternative,
    Chunk,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    TokenLogprob,
)
from serving.engines.native.detokenizer import Detokenizer, TextDecoder
from serving.engines.native.runner import Runner, Sampled
from serving.engines.native.sampling import Likely
from serving.engines.native.scheduler import Piece, Scheduler
from serving.engines.native.sequence import Deliver, Sequence

_logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Add:
    sequence: Sequence


@dataclass(frozen=True)
class _Cancel:
    sequence: Sequence


class _Close:
    pass


class NativeEngine:
    """Continuous batching over one model; see `serving.engines._protocol.Engine`."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        *,
        decoder: TextDecoder | None,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Start the engine's thread; without a `decoder` chunks carry token ids only."""
        self._runner = runner
        self._scheduler = scheduler
        self._info = info
        self._decoder = decoder
        self._stop_ids = frozenset(stop_ids)
        self._prompt_tokens = self._generated_tokens = self._num_ticks = 0
        self._commands: SimpleQueue[_Add | _Cancel | _Close] = SimpleQueue()
        self._lock = threading.Lock()  # Guards `_failure` against a submission that comes too late.
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._serve, name="native-engine", daemon=True)
        self._thread.start()

    def info(self) -> EngineInfo:
        """Return what this engine runs."""
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish reason; closing the iterator cancels the work."""
        results: asyncio.Queue[Chunk | EngineError] = asyncio.Queue()
        sequence = self._sequence(request, _deliver_to(asyncio.get_running_loop(), results))
        self._submit(sequence)
        is_done = False
        try:
            while not is_done:
                item = await results.get()
                is_done = isinstance(item, EngineError) or item.finish_reason is not None
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            if not is_done:
                self._commands.put(_Cancel(sequence))

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        if self._failure is not None:
            raise self._failure
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_slots=self._scheduler.num_free_slots,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            num_ticks=self._num_ticks,
        )

    def close(self) -> None:
        """Stop the thread; sequences that still run end with EngineError."""
        self._commands.put(_Close())
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _sequence(self, request: GenerateRequest, deliver: Deliver) -> Sequence:
        num_prompt, max_len = len(request.prompt_tokens), self._info.max_len
        max_tokens = max_len - num_prompt if request.max_tokens is None else request.max_tokens
        if num_prompt + max(max_tokens, 1) > max_len:
            raise ContextLengthError(
                f"this model's context is {max_len} tokens; the prompt has {num_prompt}, and "
                f"{max(max_tokens, 1)} were asked for. Shorten the prompt or lower `max_tokens`."
            )
        # Only now: this takes long for a prompt of millions of tokens, and holds the event loop.
        wrong = [t for t in request.prompt_tokens if not 0 <= t < self._info.vocab_size]
        if wrong:
            raise RequestError(
                f"token id {wrong[0]} is not in the vocabulary of {self._info.vocab_size} tokens."
            )
        if request.stop and self._decoder is None:
            raise RequestError("`stop` needs a tokenizer, and this engine has none.")
        detokenizer = Detokenizer(self._decoder, request.prompt_tokens, request.stop)
        return Sequence(request, max_tokens, detokenizer, deliver)

    def _submit(self, sequence: Sequence) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._commands.put(_Add(sequence))

    # What follows runs on the engine's thread.

    def _serve(self) -> None:
        try:
            while self._take_commands():
                self._tick()
            failure = EngineError("the engine was closed. Start another one.")
        except Exception as error:
            _logger.exception("the engine stopped")
            failure = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
        self._end(failure)

    def _take_commands(self) -> bool:
        """Carry out what was asked since the last pass, waiting while idle; False to stop."""
        while self._scheduler.is_idle or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Add):
                self._scheduler.add(command.sequence)
            else:
                self._scheduler.cancel(command.sequence)
        return True

    def _tick(self) -> None:
        pieces = self._scheduler.schedule()
        sampled = self._runner.run(pieces)
        self._advance(pieces)
        for result in sampled:
            self._collect(result)

    def _advance(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            piece.sequence.num_cached += piece.length
            if piece.start < piece.sequence.num_prompt:
                self._prompt_tokens += piece.length
        self._num_ticks += 1

    def _collect(self, result: Sampled) -> None:
        sequence, token_id = result.sequence, result.token_id
        if token_id is None:
            self._scheduler.cancel(sequence)
            sequence.deliver(EngineError("the model computed values that are not finite."))
            return
        chunk = self._chunk(sequence, token_id, result.likely)
        if chunk.finish_reason is not None:
            self._scheduler.finish(sequence)
        sequence.deliver(chunk)

    def _chunk(self, sequence: Sequence, token_id: int, likely: Likely | None) -> Chunk:
        """Add the token to its sequence; an end token ends it and is no part of it."""
        if token_id in self._stop_ids and not sequence.request.ignore_eos:
            return Chunk(sequence.detokenizer.finish(), (), FinishReason.STOP)
        self._generated_tokens += 1
        sequence.tokens.append(token_id)
        text = sequence.detokenizer.push(token_id)
        reason = None
        if sequence.detokenizer.is_stopped:
            reason = FinishReason.STOP
        elif sequence.num_generated == sequence.max_tokens:
            text += sequence.detokenizer.finish()
            is_stopped = sequence.detokenizer.is_stopped
            reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
        return Chunk(text, (token_id,), reason, self._logprobs(token_id, likely))

    def _logprobs(self, token_id: int, likely: Likely | None) -> tuple[TokenLogprob, ...]:
        if likely is None:
            return ()
        top = tuple(
            Alternative(other, self._text_of(other), logprob)
            for other, logprob in zip(likely.top_ids, likely.top_logprobs, strict=True)
        )
        return (TokenLogprob(token_id, self._text_of(token_id), likely.logprob, top),)

    def _text_of(self, token_id: int) -> str:
        return "" if self._decoder is None else self._decoder.decode([token_id])

    def _end(self, failure: EngineError) -> None:
        with self._lock:
            self._failure = failure
        sequences = self._scheduler.cancel_all()
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                sequences.append(command.sequence)
        for sequence in sequences:
            sequence.deliver(failure)


def _deliver_to(
    loop: asyncio.AbstractEventLoop, results: asyncio.Queue[Chunk | EngineError]
) -> Deliver:
    def deliver(item: Chunk | EngineError) -> None:
        try:
            loop.call_soon_threadsafe(results.put_nowait, item)
        except RuntimeError:  # The loop is closed: nobody listens any more.
            _logger.warning("a result was dropped: the event loop that asked for it is closed")

    return deliver
