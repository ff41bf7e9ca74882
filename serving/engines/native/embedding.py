"""The embedding side of the native engine: one thread that computes whatever waits, together.

Takes token ids from any event loop; gives a vector for each input. It does not know about HTTP,
Ray, or how an encoder computes.

Inputs lie one behind the other in a pass, without padding, so a pass takes up to `max_batch_tokens`
tokens, long and short ones alike. The least served tenant's input is next, and of one tenant what
came first. Nothing waits for company: while a pass runs the next one gathers.
"""

import asyncio
import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import ConfigError, ContextLengthError, EngineError, RequestError
from jobs.compression.encoders import load_encoder
from jobs.data.tokenizer import check_fits, load_tokenizer
from serving.engines._protocol import EngineInfo, EngineStats
from serving.engines.native.checks import check_tokens
from serving.engines.native.config import EngineConfig
from serving.engines.native.engine_thread import EngineThread, Work
from serving.engines.native.memory import activation_dtype, choose_device
from serving.engines.native.tenants import TenantOf, TenantsOf

_logger = logging.getLogger(__name__)
_OPTIONS = frozenset({"device", "dtype", "max_batch_tokens", "max_len", "num_threads"})

Compute = Callable[[Sequence[Sequence[int]]], Tensor]


@dataclass(eq=False)
class _Call:
    """One caller's inputs and the vectors that were computed for them so far, in order."""

    inputs: list[tuple[int, ...]]
    tenant: str
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[list[list[float]]]
    submitted_s: float
    num_taken: int = 0
    vectors: list[list[float]] = field(default_factory=list)
    is_cancelled: bool = False

    @property
    def num_waiting(self) -> int:
        return len(self.inputs) - self.num_taken


_Batch = dict[_Call, list[tuple[int, ...]]]


class NativeEmbedder:
    """Dynamic batching over one encoder; see `serving.engines._protocol.EmbeddingEngine`."""

    def __init__(
        self,
        compute: Compute,
        info: EngineInfo,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the engine's thread; `compute` gives vectors [N, width] for N inputs."""
        self._compute = compute
        self._info = info
        self._max_batch_tokens = max_batch_tokens
        self._clock = clock
        self._tenants: TenantsOf[_Call] = TenantsOf()
        self._waiting: dict[_Call, None] = {}  # Of all tenants; other threads read it, too.
        self._batch: _Batch = {}
        self._num_running = self._tokens_waiting = self._prompt_tokens = self._num_passes = 0
        self._lock = threading.Lock()  # Guards `_tokens_waiting`.
        self._thread = EngineThread(
            "native-embedder",
            Work(lambda: not self._waiting, self._take, self._tick, self._end),
        )

    def info(self) -> EngineInfo:
        """Return what this engine runs."""
        return self._info

    async def embed(self, inputs: Sequence[tuple[int, ...]], tenant: str = "") -> list[list[float]]:
        """Return a vector of unit length for each input; cancelling the call cancels the work."""
        for tokens in inputs:
            self._check(tokens)
        if not inputs:
            return []
        loop = asyncio.get_running_loop()
        call = _Call(list(inputs), tenant, loop, loop.create_future(), self._clock())
        self._submit(call)
        try:
            return await call.answer
        finally:
            call.is_cancelled = True  # Of no effect once the answer is there.

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        self._thread.check()
        waiting = [call for call in tuple(self._waiting) if not call.is_cancelled]
        oldest_s = min((call.submitted_s for call in waiting), default=self._clock())
        return EngineStats(
            num_running=self._num_running,
            num_waiting=sum(call.num_waiting for call in waiting),
            num_free_slots=max(0, self._info.max_slots - self._num_running),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=0,
            num_ticks=self._num_passes,
            tokens_in_flight=self._tokens_waiting,
            queue_age_s=self._clock() - oldest_s,
        )

    def close(self) -> None:
        """Stop the thread; calls that still run raise EngineError."""
        self._thread.close()

    def _check(self, tokens: tuple[int, ...]) -> None:
        if not tokens:
            raise RequestError("an input is empty: the model needs at least one token.")
        if len(tokens) > self._info.max_len:
            raise ContextLengthError(
                f"this model reads {self._info.max_len} tokens; an input has {len(tokens)}. "
                "Shorten it, or split it."
            )
        check_tokens(tokens, self._info.vocab_size)

    def _submit(self, call: _Call) -> None:
        with self._lock:
            self._tokens_waiting += sum(map(len, call.inputs))
        self._thread.submit(call)

    # What follows runs on the engine's thread.

    def _take(self, call: _Call) -> None:
        self._waiting[call] = None
        self._tenants.enter(call.tenant).waiting.append(call)

    def _tick(self) -> None:
        self._batch = batch = self._schedule()
        if not batch:
            return
        inputs = [tokens for taken in batch.values() for tokens in taken]
        self._num_running = len(inputs)
        with torch.inference_mode():
            vectors_NC = self._compute(inputs)
        vectors: list[list[float]] = vectors_NC.tolist()
        self._num_running, self._batch = 0, {}
        self._collect(batch, vectors)

    def _schedule(self) -> _Batch:
        """Take inputs, the least served tenant's first, up to the budget but at least one."""
        batch: _Batch = {}
        budget = self._max_batch_tokens
        # Places keep the order of tenants that were served alike.
        turns = [(t.served, place, t) for place, t in enumerate(self._tenants.active())]
        while turns:
            _, place, tenant = turns[0]
            call = self._next_call(tenant)
            if call is None:
                heapq.heappop(turns)
                continue
            tokens = call.inputs[call.num_taken]
            if len(tokens) > budget and batch:
                break
            batch.setdefault(call, []).append(tokens)
            call.num_taken += 1
            budget -= len(tokens)
            tenant.served += len(tokens)
            if not call.num_waiting:
                self._drop_first(tenant)
            heapq.heapreplace(turns, (tenant.served, place, tenant))
        return batch

    def _next_call(self, tenant: TenantOf[_Call]) -> _Call | None:
        """Return a tenant's first call that still wants vectors, and drop those before it."""
        while tenant.waiting and tenant.waiting[0].is_cancelled:
            self._drop_first(tenant)
        return tenant.waiting[0] if tenant.waiting else None

    def _drop_first(self, tenant: TenantOf[_Call]) -> None:
        call = tenant.waiting.popleft()
        del self._waiting[call]
        self._tenants.leave(tenant)
        with self._lock:
            self._tokens_waiting -= sum(map(len, call.inputs[call.num_taken :]))

    def _collect(self, batch: _Batch, vectors: list[list[float]]) -> None:
        num_tokens, start = 0, 0
        done: dict[asyncio.AbstractEventLoop, list[_Call]] = {}
        for call, taken in batch.items():
            call.vectors += vectors[start : start + len(taken)]
            start += len(taken)
            num_tokens += sum(map(len, taken))
            if len(call.vectors) == len(call.inputs):
                done.setdefault(call.loop, []).append(call)
        self._num_passes += 1
        self._prompt_tokens += num_tokens
        with self._lock:
            self._tokens_waiting -= num_tokens
        for loop, calls in done.items():
            _wake(loop, calls, None)

    def _end(self, failure: EngineError, commands: list[_Call]) -> None:
        for call in {*self._waiting, *commands, *self._batch}:
            _wake(call.loop, [call], failure)


def create_embedder(directory: Path, config: EngineConfig) -> NativeEmbedder:
    """Load a published encoder, whose digests the caller has checked, and start an engine.

    Activations are bfloat16 where the device multiplies that faster than float32, unless the
    options say otherwise. Raises ConfigError for an option that only decoders have, and
    ModelFormatError or TokenizerError.
    """
    if unknown := sorted(config.model_fields_set - _OPTIONS):
        raise ConfigError(
            f"engine options: this model is an encoder, which has no {', '.join(unknown)}. Leave "
            f"that out; there is: {', '.join(sorted(_OPTIONS))}."
        )
    device = choose_device(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    loaded = load_encoder(directory, dtype=_dtype(config, device), device=device, verify=False)
    check_fits(load_tokenizer(directory), loaded.config.vocab_size)
    info = EngineInfo(
        engine="native",
        vocab_size=loaded.config.vocab_size,
        max_len=min(config.max_len, loaded.config.max_seq_len),
        max_slots=config.max_batch_tokens,
        weight_bytes=loaded.weight_bytes,
        cache_bytes=0,
        schemes=loaded.schemes,
        operators=loaded.operators,
        task="embed",
    )
    return NativeEmbedder(loaded.model, info, config.max_batch_tokens)


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return activation_dtype(config, device)
    # A vector is a mean over tokens and features of unit length: bfloat16 moves it by 1e-4 cosine.
    is_fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32


def _wake(
    loop: asyncio.AbstractEventLoop, calls: Sequence[_Call], failure: EngineError | None
) -> None:
    """Answer calls of one event loop, with one wake-up of it."""

    def answer() -> None:
        for call in calls:
            if call.answer.done():
                continue
            if failure is not None:  # Each its own: raising one adds to its traceback.
                call.answer.set_exception(EngineError(failure.message))
            else:
                call.answer.set_result(call.vectors)

    try:
        loop.call_soon_threadsafe(answer)
    except RuntimeError:  # The loop is closed: nobody listens any more.
        _logger.warning("vectors were dropped: the event loop that asked for them is closed")
