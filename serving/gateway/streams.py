"""A stream of server-sent events to one client, who may leave, stall, or wait in a queue.

Takes lines; gives ASGI messages. It does not know what the lines say.
"""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import Message, Receive, Send

from serving.gateway import errors
from serving.gateway.limits import GatewayLimits
from serving.gateway.rendering import encode
from serving.messages import Refused

DONE = b"data: [DONE]\n\n"
_COMMENT = b": still here\n\n"
_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold the stream back.
    ],
}


class Wire:
    """Where one answer's bytes go; the response starts with the first of them."""

    def __init__(
        self, send: Send, limits: GatewayLimits, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        self._send, self._limits, self._headers = send, limits, headers
        self._lock = asyncio.Lock()
        self._num_writes = 0
        self._is_closed = False
        self.has_started = self.has_ended = False

    async def write(self, lines: bytes, *, is_last: bool = False) -> None:
        """Send lines; returns when the client can take more."""
        async with self._lock:
            if not self.has_started:
                self.has_started = True
                headers = [*_START["headers"], *self._headers]
                await self._send({**_START, "headers": headers})
            body = {"type": "http.response.body", "body": lines, "more_body": not is_last}
            await self._send(body)
            self.has_ended = is_last
        self._num_writes += 1

    async def finish(self, lines: bytes = b"") -> None:
        """Send the last lines and the mark of the end."""
        self.close()
        await self.write(lines + DONE, is_last=True)

    async def fail(self, refused: Refused) -> None:
        """End a stream that has started: one `error` event, then the mark of the end.

        OpenAI's clients raise what a stream says under `error`.
        """
        await self.finish(b"event: error\ndata: " + encode(errors.document(refused)) + b"\n\n")

    def close(self) -> None:
        """Send no more comments."""
        self._is_closed = True

    async def watch(self) -> None:
        """Send comments while nothing else is sent; return when the client has stalled."""
        while True:
            seen = self._num_writes
            await asyncio.sleep(self._limits.keep_alive_s)
            if self._num_writes != seen:
                continue
            if self._lock.locked():
                await asyncio.sleep(self._limits.max_stall_s)
                if self._num_writes == seen:
                    return
            elif not self._is_closed and not await self._has_taken_comment():
                return

    async def _has_taken_comment(self) -> bool:
        try:
            async with asyncio.timeout(self._limits.max_stall_s):
                await self.write(_COMMENT)
        except TimeoutError:
            return False
        return True


async def run_while_connected(
    receive: Receive,
    work: Callable[[], Awaitable[None]],
    watch: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    """Run `work` to its end, or cancel it as soon as the client leaves or `watch` returns.

    Returns whether it came to its end.
    """

    async def client_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work())
    tasks = [working, asyncio.ensure_future(client_left())]
    if watch is not None:
        tasks.append(asyncio.ensure_future(watch()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
