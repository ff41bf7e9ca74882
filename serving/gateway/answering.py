"""From an accepted request to bytes: counts, places, streams, and clients that leave.

Takes a request and its rendering; gives an ASGI response. It does not know the OpenAI schemas or
how a backend works.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serving.gateway import errors
from serving.gateway.backend import Backend
from serving.gateway.errors import RefusedError
from serving.gateway.limits import Admission
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.rendering import Choice, Header, Rendering, Usage, tokens_length
from serving.messages import Delta, Event, InferenceRequest, Refused, ServedModel, Started

_logger = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Question:
    """One request: what is asked of which model, and how its answer looks."""

    model: ServedModel
    inference: InferenceRequest
    rendering: Rendering
    is_stream: bool
    includes_usage: bool
    has_token_ids: bool

    def header(self) -> Header:
        """Return what all documents of the answer begin with."""
        has_logprobs = self.inference.sampling.num_logprobs is not None
        created_s = int(time.time())
        name = self.model.name
        return Header(uuid.uuid4().hex, created_s, name, self.has_token_ids, has_logprobs)


class Answering:
    """Answers questions with a backend, within the bound of accepted work."""

    def __init__(self, backend: Backend, admission: Admission, metrics: GatewayMetrics) -> None:
        self._backend = backend
        self._admission = admission
        self._metrics = metrics

    def response(self, question: Question) -> Response:
        """Return a response that works when it is sent, and stops when the client leaves."""
        return _Answer(self, question)

    async def send(self, question: Question, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Raises RefusedError while nothing was sent."""
        async with aclosing(self._events(question)) as events:
            first = await anext(events, None)
            assert first is not None, "an answer has at least one event"
            if question.is_stream:
                await self._send_stream(question, first, events, send)
                return
            document = await self._collect(question, first, events)
        await JSONResponse(document)(scope, receive, send)

    async def _events(self, question: Question) -> AsyncGenerator[list[Event], None]:
        """Yield batches of events while holding places; raise RefusedError at a refusal."""
        name, started = question.model.name, time.monotonic()
        has_token = False
        with self._admission.hold(question.inference.total_choices):
            source = self._backend.generate(question.model, question.inference)
            async with aclosing(source):
                async for batch in source:
                    for event in batch:
                        if isinstance(event, Refused):
                            raise RefusedError(event)
                        if isinstance(event, Started):
                            self._metrics.tokens(name, prompt=event.prompt_tokens)
                            continue
                        self._metrics.tokens(name, generated=len(event.token_ids))
                        if not has_token:
                            has_token = True
                            self._metrics.first_token(name, time.monotonic() - started)
                    yield batch

    async def _collect(
        self, question: Question, first: list[Event], events: AsyncIterator[list[Event]]
    ) -> dict[str, object]:
        tally = _Tally(question.inference.total_choices)
        tally.add(first)
        async for batch in events:
            tally.add(batch)
        return question.rendering.whole(question.header(), tally.choices, tally.usage())

    async def _send_stream(
        self,
        question: Question,
        first: list[Event],
        events: AsyncIterator[list[Event]],
        send: Send,
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for lines in _stream_lines(question, first, events):
            await send({"type": "http.response.body", "body": lines, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


class _Answer(Response):
    def __init__(self, answering: Answering, question: Question) -> None:
        super().__init__()
        self._answering = answering
        self._question = question

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            try:
                await self._answering.send(self._question, scope, receive, send)
            except RefusedError as error:
                await errors.response(error.refused)(scope, receive, send)

        await run_while_connected(receive, work)


async def run_while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` to its end, or cancel it as soon as the client leaves."""

    async def client_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work())
    watching = asyncio.ensure_future(client_left())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class _Tally:
    """Adds up the events of one answer."""

    def __init__(self, num_choices: int) -> None:
        self.choices = [Choice() for _ in range(num_choices)]
        self._prompt_tokens = 0

    def add(self, batch: list[Event]) -> None:
        for event in batch:
            if isinstance(event, Started):
                self._prompt_tokens += event.prompt_tokens
            elif isinstance(event, Delta):
                self.choices[event.choice].add(event)

    def usage(self) -> Usage:
        generated = sum(len(choice.token_ids) for choice in self.choices)
        return Usage(self._prompt_tokens, generated)


async def _stream_lines(
    question: Question, first: list[Event], events: AsyncIterator[list[Event]]
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of an answer, all but the last one."""
    header, rendering = question.header(), question.rendering
    tally = _Tally(question.inference.total_choices)
    opening = rendering.opening(header, len(tally.choices))
    yield b"".join(_chunk_line(question, chunk) for chunk in opening)
    try:
        yield _batch_lines(question, header, tally, first)
        async for batch in events:
            yield _batch_lines(question, header, tally, batch)
    except RefusedError as error:
        # The status is sent; the OpenAI clients raise what a stream says under `error`.
        _logger.warning("a stream was cut short: %s", error.refused.message)
        yield _line(errors.document(error.refused))
        return
    if question.includes_usage:
        yield _line(rendering.usage(header, tally.usage()))


def _batch_lines(question: Question, header: Header, tally: _Tally, batch: list[Event]) -> bytes:
    lines = []
    for event in batch:
        if not isinstance(event, Delta):
            continue
        has_news = event.text or event.finish_reason or event.logprobs or header.has_token_ids
        if has_news:
            offset = tokens_length(tally.choices[event.choice].logprobs)
            lines.append(_chunk_line(question, question.rendering.chunk(header, event, offset)))
        tally.choices[event.choice].add(event)
    tally.add([event for event in batch if isinstance(event, Started)])
    return b"".join(lines)


def _chunk_line(question: Question, chunk: dict[str, object]) -> bytes:
    """Return a chunk's event; where usage is asked for, OpenAI states it as null until the end."""
    return _line({**chunk, "usage": None} if question.includes_usage else chunk)


def _line(document: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


REFUSED_INTERNALLY = Refused(
    HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed. The operator finds the reason in its log."
)
