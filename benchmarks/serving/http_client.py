"""A light streaming client of the REST API: times of tokens as they arrive on the socket.

Takes requests; gives answers. On few cores a client that costs as much as the server would measure
itself: this one notes when bytes arrived, and reads them when somebody asks what they say.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import uvloop

from benchmarks.serving.workload import Answers, Request

_EVENT = re.compile(rb"data: (.*?)\r?\n\r?\n", re.DOTALL)
_END_OF_HEADERS = b"\r\n\r\n"


@dataclass(frozen=True)
class Content:
    """What a reply says; the time of a token is that of the bytes that completed it."""

    status: int = 0
    tokens: tuple[int, ...] = ()
    times_s: tuple[float, ...] = ()
    is_whole: bool = False
    error: str | None = None  # What the server said.


@dataclass
class Reply:
    """What came back for one request; times are those of `time.perf_counter`."""

    asked_s: float
    answered_s: float = 0.0
    failure: str | None = None  # How the connection failed.
    received: list[tuple[float, bytes]] = field(default_factory=list)  # when, what

    @cached_property
    def content(self) -> Content:
        """What was received, read once: ask for it when the reply has ended."""
        return read(self.received)


@dataclass(frozen=True)
class Api:
    """Where the API is, and as whom it is asked."""

    host: str
    port: int
    key: str
    model: str


async def ask(
    api: Api,
    request: Request,
    *,
    leave_after: int | None = None,
    leave_after_s: float | None = None,
) -> Reply:
    """Stream one completion; hang up after so many tokens, or after so long."""
    reply = Reply(asked_s=time.perf_counter())
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(leave_after_s) as leaving:
            transport, exchange = await loop.create_connection(
                lambda: _Exchange(_bytes_of(api, request), reply, leave_after), api.host, api.port
            )
            try:
                await exchange.ended
            finally:
                transport.close()
    except (OSError, EOFError) as error:  # TimeoutError is an OSError.
        if not leaving.expired():
            reply.failure = f"{type(error).__name__}: {error}"
    reply.answered_s = reply.answered_s or time.perf_counter()
    return reply


def read(received: Sequence[tuple[float, bytes]]) -> Content:
    """Return what bytes say that came at these times, a stream of events or a refusal."""
    headers, end, body = b"".join(data for _, data in received).partition(_END_OF_HEADERS)
    if not end:
        return Content()
    status = int(headers.split(b" ", 2)[1])
    if status != 200:
        return Content(status, error=body.decode(errors="replace"))
    arrivals = iter(received)
    tokens: list[int] = []
    times_s: list[float] = []
    is_whole, error = False, None
    now_s, num_bytes = 0.0, -len(headers + end)
    for match in _EVENT.finditer(body):
        while num_bytes < match.end():
            now_s, data = next(arrivals)
            num_bytes += len(data)
        if match[1] == b"[DONE]":
            is_whole = error is None
            continue
        document: dict[str, Any] = json.loads(match[1])
        if "error" in document:
            error = json.dumps(document["error"])
            continue
        for choice in document["choices"]:
            ids = choice.get("token_ids") or ()
            tokens += ids
            times_s += [now_s] * len(ids)
    return Content(status, tuple(tokens), tuple(times_s), is_whole, error)


class Served:
    """The REST API as a contender."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.last_tokens: list[list[int]] = []

    def run(self, requests: Sequence[Request]) -> Answers:
        """Return the times of the tokens of every request, 429 and errors as empty answers."""
        start_s, replies = uvloop.run(ask_all(self.api, requests))
        contents = [reply.content for reply in replies]
        self.last_tokens = [list(content.tokens) for content in contents]
        times = tuple(tuple(t - start_s for t in content.times_s) for content in contents)
        return Answers(tuple(requests), times)

    def close(self) -> None:
        """Do nothing: the service is not this object's."""


async def ask_all(api: Api, requests: Sequence[Request]) -> tuple[float, list[Reply]]:
    """Ask all at their times; return when the clock began, and every reply."""
    start_s = time.perf_counter()

    async def one(request: Request) -> Reply:
        await asyncio.sleep(max(0.0, start_s + request.at_s - time.perf_counter()))
        return await ask(api, request)

    return start_s, list(await asyncio.gather(*(one(request) for request in requests)))


def _bytes_of(api: Api, request: Request) -> bytes:
    body = json.dumps(
        {
            "model": api.model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {api.host}:{api.port}\r\n"
        f"Authorization: Bearer {api.key}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Exchange(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, asked: bytes, reply: Reply, leave_after: int | None) -> None:
        self._asked, self._reply, self._leave_after = asked, reply, leave_after
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._asked)

    def data_received(self, data: bytes) -> None:
        received = self._reply.received
        received.append((time.perf_counter(), data))
        if self._leave_after is not None and len(read(received).tokens) >= self._leave_after:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and not self._reply.received:
            exc = EOFError("the server closed the connection without a word")
        self._end(exc)

    def _end(self, failure: Exception | None) -> None:
        if self.ended.done():
            return
        self._reply.answered_s = time.perf_counter()
        if failure is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(failure)
