"""A light streaming client of the REST API: times of tokens as they arrive on the socket.

Takes requests; gives answers. It is plain sockets and a regular expression, because on few cores a
client that costs more than the server would measure itself.
"""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.workload import Answers, Request

_EVENT = re.compile(rb"data: (.*?)\r?\n\r?\n", re.DOTALL)
_READ_BYTES = 1 << 16


@dataclass
class Reply:
    """What came back for one request; times are those of `time.perf_counter`."""

    status: int = 0
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_whole: bool = False
    error: str | None = None  # What the server said.
    failure: str | None = None  # How the connection failed.
    headers: bytes = b""
    asked_s: float = 0.0
    answered_s: float = 0.0


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
    try:
        async with asyncio.timeout(leave_after_s) as leaving:
            await _exchange(api, request, reply, leave_after)
    except (OSError, EOFError) as error:  # TimeoutError is an OSError.
        if not leaving.expired():
            reply.failure = f"{type(error).__name__}: {error}"
    reply.answered_s = reply.answered_s or time.perf_counter()
    return reply


class Served:
    """The REST API as a contender."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.last_tokens: list[list[int]] = []

    def run(self, requests: Sequence[Request]) -> Answers:
        """Return the times of the tokens of every request, 429 and errors as empty answers."""
        start_s, replies = asyncio.run(ask_all(self.api, requests))
        self.last_tokens = [reply.tokens for reply in replies]
        times = tuple(tuple(t - start_s for t in reply.times_s) for reply in replies)
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


async def _exchange(api: Api, request: Request, reply: Reply, leave_after: int | None) -> None:
    reader, writer = await asyncio.open_connection(api.host, api.port)
    try:
        writer.write(_bytes_of(api, request))
        await _read(reader, reply, leave_after)
        reply.answered_s = time.perf_counter()
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, reply: Reply, leave_after: int | None) -> None:
    reply.headers = await reader.readuntil(b"\r\n\r\n")
    reply.status = int(reply.headers.split(b" ", 2)[1])
    pending = b""
    while data := await reader.read(_READ_BYTES):
        now_s = time.perf_counter()
        pending += data
        if reply.status != 200:
            continue
        end = 0
        for match in _EVENT.finditer(pending):
            end = match.end()
            _take(reply, match[1], now_s)
        pending = pending[end:]
        if leave_after is not None and len(reply.tokens) >= leave_after:
            return
    if reply.status != 200:
        reply.error = pending.decode(errors="replace")


def _take(reply: Reply, event: bytes, now_s: float) -> None:
    if event == b"[DONE]":
        reply.is_whole = reply.error is None
        return
    document: dict[str, Any] = json.loads(event)
    if "error" in document:
        reply.error = json.dumps(document["error"])
        return
    for choice in document["choices"]:
        ids = choice.get("token_ids") or ()
        reply.tokens.extend(ids)
        reply.times_s.extend([now_s] * len(ids))
