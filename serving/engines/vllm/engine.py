"""The vLLM engine: one event loop of its own that drives vLLM, and readers on any other.

Takes requests from any event loop; gives each its chunks. Scheduling and sampling are vLLM's; text,
stop strings and the end of an answer are ours, as in every engine. It does not know about HTTP, Ray
or where the model came from.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

from vllm import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from cluster.errors import EngineError, RequestError
from serving.engines._protocol import Chunk, EngineInfo, EngineStats, GenerateRequest
from serving.engines.native.answers import Vocabulary, append, resume
from serving.engines.native.checks import check_request
from serving.engines.native.detokenizer import Detokenizer
from serving.engines.native.mailbox import Mailbox, deliver
from serving.engines.native.sampling import Likely, SamplingRow, SamplingState
from serving.engines.native.sequence import Sequence as Answer
from serving.engines.vllm.params import sampling_params

_logger = logging.getLogger(__name__)
_START_TIMEOUT_S = 900.0  # vLLM may compile kernels.
_CLOSE_TIMEOUT_S = 30.0
Start = Callable[[AsyncEngineArgs], Coroutine[Any, Any, AsyncLLM]]


class VllmEngine:
    """vLLM over one model; see `serving.engines._protocol.Engine`."""

    def __init__(
        self,
        arguments: AsyncEngineArgs,
        info: EngineInfo,
        vocabulary: Vocabulary,
        adapters: Mapping[str, LoRARequest],
        start: Start | None = None,
    ) -> None:
        """Start vLLM, or what `start` gives; raises EngineError if it does not come up."""
        self._info = info
        self._vocabulary = vocabulary
        self._adapters = dict(adapters)
        self._numbers = itertools.count()
        self._running: dict[Answer, Future[None]] = {}
        self._prompt_tokens = self._generated_tokens = self._cached_tokens = self._num_outputs = 0
        self._lock = threading.Lock()  # Guards `_failure` and `_running`.
        self._failure: EngineError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm: AsyncLLM = self._call((start or _start)(arguments)).result(_START_TIMEOUT_S)
        except Exception as error:
            self._stop_loop()
            raise EngineError(
                f"vLLM does not start with this model: {type(error).__name__}: {error}"
            ) from error

    def info(self) -> EngineInfo:
        """Return what this engine runs."""
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish reason; closing the iterator cancels the work."""
        mailbox = Mailbox(asyncio.get_running_loop())
        if not request.resumed_tokens:
            answer = self._answer(request, mailbox)
        else:  # Going over many tokens may take seconds.
            answer = await asyncio.to_thread(self._answer, request, mailbox)
        chunk = resume(answer)
        if chunk is not None:
            yield chunk
            return
        params = sampling_params(
            request, answer.max_tokens, self._vocabulary.stop_ids, self._info.vocab_size
        )
        answer.waiting_since_s = time.monotonic()
        with self._lock:
            if self._failure is not None:
                raise EngineError(self._failure.message)
            work = self._running[answer] = self._call(self._run(answer, params))
        try:
            while chunk is None or chunk.finish_reason is None:
                chunk = await answer.mailbox.take()
                yield chunk
        finally:
            work.cancel()  # Of no effect once it has ended.

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped.

        vLLM does not say which sequences wait: those beyond its slots are counted as waiting, and
        the oldest without any token is taken for the one that has waited longest.
        """
        if self._failure is None and self._llm.errored:
            self._fail(EngineError(f"vLLM stopped: {self._llm.dead_error}"))
        if self._failure is not None:
            raise EngineError(self._failure.message)
        answers = tuple(self._running)
        num_running = min(len(answers), self._info.max_slots)
        unread_s = [answer.waiting_since_s for answer in answers if answer.num_reused is None]
        does_wait = len(answers) > num_running and unread_s
        return EngineStats(
            num_running=num_running,
            num_waiting=len(answers) - num_running,
            num_free_slots=self._info.max_slots - num_running,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            num_ticks=self._num_outputs,
            tokens_in_flight=sum(_num_owed(answer) for answer in answers),
            queue_age_s=time.monotonic() - min(unread_s) if does_wait else 0.0,
            cached_prompt_tokens=self._cached_tokens,
        )

    def close(self) -> None:
        """Stop vLLM; sequences that still run end with EngineError."""
        self._fail(EngineError("the engine was closed. Start another one."))
        if self._thread.is_alive():
            self._call(_shut_down(self._llm)).result(_CLOSE_TIMEOUT_S)
            self._stop_loop()

    def _answer(self, request: GenerateRequest, mailbox: Mailbox) -> Answer:
        max_tokens = check_request(request, self._info, self._vocabulary)
        return Answer(
            request,
            max_tokens,
            Detokenizer(
                self._vocabulary.decoder,
                request.prompt_tokens,
                request.stop,
                request.resumed_tokens,
            ),
            SamplingState(SamplingRow(), None, None, None),  # vLLM samples.
            mailbox,
        )

    def _call(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _fail(self, failure: EngineError) -> None:
        """End every sequence; the first failure is the one that is told."""
        with self._lock:
            self._failure = self._failure or failure
            running = dict(self._running)
        for answer, work in running.items():
            work.cancel()
            deliver([(answer.mailbox, EngineError(self._failure.message))])

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)

    # What follows runs on the engine's own event loop.

    async def _run(self, answer: Answer, params: Any) -> None:
        """Let vLLM continue one sequence, and hand its chunks and its end to the reader."""
        try:
            await self._follow(answer, params)
        except VLLMClientError as error:
            self._end(answer, RequestError(f"vLLM refuses the request: {error}"))
        except Exception as error:
            _logger.exception("vLLM failed")
            self._end(answer, EngineError(f"vLLM failed: {_reason(error)}"))
        except asyncio.CancelledError:  # By the reader, who is gone, or within vLLM.
            self._end(answer, EngineError("vLLM's work on this was cancelled."))
            raise
        finally:
            self._forget(answer)

    async def _follow(self, answer: Answer, params: Any) -> None:
        request = answer.request
        prompt: dict[str, Any] = {"prompt_token_ids": answer.tokens.copy()}
        if request.tenant or request.adapter:
            prompt["cache_salt"] = answer.salt.hex()
        stream = self._llm.generate(
            prompt, params, str(next(self._numbers)), lora_request=self._adapter(request)
        )
        async with aclosing(stream) as outputs:
            async for output in outputs:
                if answer.num_reused is None:
                    answer.num_reused = min(output.num_cached_tokens or 0, answer.num_prompt)
                    self._prompt_tokens += answer.num_prompt
                    self._cached_tokens += answer.num_reused
                chunk = self._chunk(answer, output.outputs[0])
                self._generated_tokens += len(chunk.token_ids)
                self._num_outputs += 1
                if chunk.finish_reason is not None:
                    self._end(answer, chunk)
                    return
                deliver([(answer.mailbox, chunk)])
        self._end(answer, EngineError("vLLM ended an answer without saying why."))

    def _end(self, answer: Answer, last: Chunk | EngineError | RequestError) -> None:
        """Deliver the last of an answer; whoever reads it finds it gone from the load."""
        self._forget(answer)
        deliver([(answer.mailbox, last)])

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            self._running.pop(answer, None)

    def _adapter(self, request: GenerateRequest) -> LoRARequest | None:
        return None if request.adapter is None else self._adapters[request.adapter]

    def _chunk(self, answer: Answer, output: CompletionOutput) -> Chunk:
        likely = _likely(output, answer.request.num_logprobs)
        return append(answer, output.token_ids, likely, self._vocabulary)


async def _start(arguments: AsyncEngineArgs) -> AsyncLLM:
    return AsyncLLM.from_engine_args(arguments)


async def _shut_down(llm: AsyncLLM) -> None:
    llm.shutdown()


def _reason(error: Exception) -> str:
    if isinstance(error, (EngineDeadError, EngineGenerateError)):
        return str(error.__cause__ or error)
    return f"{type(error).__name__}: {error}"


def _num_owed(answer: Answer) -> int:
    is_read = answer.num_reused is not None
    return (0 if is_read else answer.num_prompt) + answer.max_tokens - answer.num_generated


def _likely(output: CompletionOutput, num_top: int | None) -> Sequence[Likely]:
    if num_top is None or output.logprobs is None:
        return ()
    places = []
    for token_id, found in zip(output.token_ids, output.logprobs, strict=True):
        best = sorted(
            (entry.rank, other, entry.logprob)
            for other, entry in found.items()
            if entry.rank is not None and entry.rank <= num_top
        )
        places.append(
            Likely(
                found[token_id].logprob,
                tuple(other for _, other, _ in best),
                tuple(logprob for _, _, logprob in best),
            )
        )
    return places
