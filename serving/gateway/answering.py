"""From an accepted request to bytes: reservations, streams, deadlines, and clients that leave.

Takes a request and its rendering; gives an ASGI response. It does not know the OpenAI schemas or
how a backend works.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.gateway.accounts import Accounts, Spent
from serving.gateway.backend import Backend
from serving.gateway.call import Call
from serving.gateway.deadlines import attempt
from serving.gateway.errors import RefusedError
from serving.gateway.limits import GatewayLimits
from serving.gateway.metrics import GatewayMetrics, TokenMeter
from serving.gateway.rendering import Document, Frames, Header, Rendering, Tally, merged
from serving.gateway.reserving import most_generation_tokens
from serving.gateway.responses import JsonResponse, RefusalResponse
from serving.gateway.streams import Wire, run_while_connected
from serving.messages import Delta, Event, Events, InferenceRequest, Refused, ServedModel, Started

_logger = logging.getLogger(__name__)
_INCOMPLETE = Refused(
    HTTPStatus.BAD_GATEWAY,
    "the answer was cut short: the model's replica went away. Ask again.",
    code="answer_incomplete",
    retry_after_s=1,
)
_STOPPED = Refused(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "the answer was cut short: the server stops. Ask again.",
    code="server_stopping",
    retry_after_s=1,
)
_FAREWELL_TIMEOUT_S = 1.0
_STALLED = Refused(HTTPStatus.REQUEST_TIMEOUT, "the client stopped reading.", code="client_stalled")


@dataclass(frozen=True)
class Question:
    """One request: what is asked of which model, and how its answer looks."""

    model: ServedModel
    inference: InferenceRequest
    rendering: Rendering
    is_stream: bool = False
    includes_usage: bool = False
    has_token_ids: bool = False
    timeout_s: float | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()  # Of the response to a stream.

    def header(self, call: Call) -> Header:
        """Return what all documents of the answer begin with."""
        return Header(
            id=call.request_id,
            created_s=int(time.time()),
            model=self.model.name,
            has_token_ids=self.has_token_ids,
            has_logprobs=self.inference.sampling.num_logprobs is not None,
            has_usage=self.includes_usage,
        )


class Answering:
    """Answers questions with a backend, on the callers' accounts."""

    def __init__(
        self, backend: Backend, accounts: Accounts, limits: GatewayLimits, metrics: GatewayMetrics
    ) -> None:
        self.limits = limits
        self._backend, self._accounts, self._metrics = backend, accounts, metrics

    def response(
        self,
        question: Question,
        call: Call,
        on_refused: Callable[[Refused], None] = lambda refused: None,
    ) -> Response:
        """Return a response that works when it is sent, and stops when the client leaves.

        `on_refused` is called before a refusal is sent, unless a part of the answer was.
        """
        return _Answer(self, question, call, on_refused)

    @asynccontextmanager
    async def begin(self, question: Question, call: Call) -> AsyncIterator["Running"]:
        """Reserve and start a request; charge what it used, and cancel it, at the block's end."""
        model, inference = question.model, question.inference
        call.model = model
        assert call.place is not None, "a request that generates holds a place"
        call.place.grow(inference.total_choices)
        most = most_generation_tokens(model, inference, self.limits.answer_tokens)
        reservation = await self._accounts.reserve(call.caller(), most, inference.total_choices)
        running = Running(question, call, self._metrics.meter(call))
        try:
            asked = msgspec.structs.replace(inference, request_id=call.request_id, team=call.team)
            running.source = self._backend.generate(model, asked)
            async with aclosing(running.source):
                yield running
        finally:
            reservation.settle(running.spent())


class Running:
    """A request in work: its events, counted and timed."""

    source: Events

    def __init__(self, question: Question, call: Call, meter: TokenMeter) -> None:
        inference = question.inference
        is_kept = not question.is_stream
        self.tally = Tally(inference.total_choices, inference.num_choices, is_kept=is_kept)
        self._call, self._meter = call, meter
        self._last_s: float | None = None

    def note(self, batch: list[Event]) -> Refused | None:
        """Count what happened; return why the request ended, if it was refused."""
        most_tokens = 0
        for event in batch:
            if isinstance(event, Delta):
                self.tally.add(event)
                most_tokens = max(most_tokens, len(event.token_ids))
            elif isinstance(event, Started):
                self.tally.start(event)
            else:
                return event
        if most_tokens:
            self._time(most_tokens)
        return None

    def spent(self) -> Spent | None:
        """Return what is to be charged; None if the work never started."""
        call, tally = self._call, self.tally
        assert call.model is not None, "set before the request began"
        call.prompt_tokens = tally.prompt_tokens
        call.cached_tokens = tally.cached_tokens
        call.generated_tokens = tally.generated_tokens
        if not tally.has_started:
            return None
        return Spent(
            call.model.name,
            call.model.version,
            tally.prompt_tokens,
            tally.generated_tokens,
            tally.cached_tokens,
        )

    def _time(self, num_tokens: int) -> None:
        now_s = time.monotonic()
        if self._last_s is None:
            self._call.first_token_s = now_s - self._call.started_s
            self._meter.first_token_s.observe(self._call.first_token_s)
        else:
            self._meter.between_tokens_s.observe((now_s - self._last_s) / num_tokens)
        self._last_s = now_s


class _Answer(Response):
    def __init__(
        self,
        answering: Answering,
        question: Question,
        call: Call,
        on_refused: Callable[[Refused], None],
    ) -> None:
        super().__init__()
        self._answering, self._question, self._call = answering, question, call
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        question, call, limits = self._question, self._call, self._answering.limits
        wire = Wire(send, limits, question.headers)

        response: Response | None = None

        async def answer() -> None:
            nonlocal response
            if question.is_stream:
                await self._stream(wire)
            else:
                response = JsonResponse(await self._whole())

        async def work() -> None:
            refused = await attempt(answer, call, question.timeout_s, limits)
            if refused is not None:
                wire.close()
                await self._refuse(refused, wire, (scope, receive, send))
            elif response is not None:
                await response(scope, receive, send)

        async def watch() -> None:
            await wire.watch()
            call.refused = _STALLED

        try:
            has_ended = await run_while_connected(
                receive, work, watch if question.is_stream else None
            )
        except asyncio.CancelledError:  # The server stops: a client that leaves raises nothing.
            await self._say_stopped(wire)
            raise
        call.has_left = not has_ended

    async def _say_stopped(self, wire: Wire) -> None:
        if not wire.has_started or wire.has_ended:
            return
        with suppress(TimeoutError):  # A client that reads nothing does not hold the server up.
            async with asyncio.timeout(_FAREWELL_TIMEOUT_S):
                await self._fail(_STOPPED, wire)

    async def _refuse(
        self, refused: Refused, wire: Wire, connection: tuple[Scope, Receive, Send]
    ) -> None:
        if not wire.has_started:
            self._on_refused(refused)
            await RefusalResponse(refused)(*connection)
        else:
            await self._fail(refused, wire)

    async def _fail(self, refused: Refused, wire: Wire) -> None:
        self._call.refused = refused
        _logger.warning("request %s was cut short: %s", self._call.request_id, refused.code)
        await wire.fail(refused)

    async def _whole(self) -> Document:
        question = self._question
        async with self._answering.begin(question, self._call) as running:
            async for batch in running.source:
                refused = running.note(batch)
                if refused is not None:
                    raise RefusedError(refused)
                if running.tally.is_complete:
                    break
        tally = running.tally
        if not tally.is_complete:
            raise RefusedError(_INCOMPLETE)
        header = question.header(self._call)
        return question.rendering.whole(header, tally.choices, tally.usage())

    async def _stream(self, wire: Wire) -> None:
        question, num_choices = self._question, self._question.inference.total_choices
        frames = question.rendering.frames(question.header(self._call), num_choices)
        lines, refused = frames.opening(), None
        async with self._answering.begin(question, self._call) as running:
            tally = running.tally
            async for batch in running.source:
                refused = running.note(batch)
                lines += _pieces(frames, batch)
                if refused is not None or tally.is_complete:
                    break
                # Until the request has started, a refusal can still have a status of its own.
                if lines and tally.has_started:
                    await wire.write(lines)
                    lines = b""
        if refused is None and not tally.is_complete:
            refused = _INCOMPLETE
        if refused is not None:
            if lines and tally.has_started:
                await wire.write(lines)
            raise RefusedError(refused)
        if question.includes_usage:
            lines += frames.usage(tally.usage())
        await wire.finish(lines)


def _pieces(frames: Frames, batch: list[Event]) -> bytes:
    # One delta is the rule: the reader keeps up.
    deltas = merged(batch) if len(batch) > 1 else batch
    return b"".join(frames.piece(delta) for delta in deltas if isinstance(delta, Delta))
