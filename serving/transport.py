"""A gateway's connection to one replica: requests out, events in, many at a time.

Takes an address and a secret; gives events of each request. It does not choose replicas, and a
request whose connection breaks ends with ReplicaLostError: what then is done is not decided here.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

from serving.frames import (
    MAX_FRAME_BYTES,
    Answer,
    Answered,
    Ask,
    Cancel,
    ClientHandshake,
    Draining,
    Embed,
    Ended,
    Frames,
    Happened,
    ProtocolError,
    Submit,
    answer_decoder,
    pack,
    unpack,
)
from serving.messages import Embedded, EmbeddingRequest, Event, InferenceRequest, Refused
from serving.replica_server import ReplicaAddress

_logger = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 5.0
# A node that is gone says nothing, not even that it is: what it leaves unanswered tells.
_PROBE_S = 3
_UNANSWERED_S = 10


class ReplicaLostError(Exception):
    """The replica, or the way to it, is gone; what it had delivered stays delivered."""


class DeclinedError(Exception):
    """The replica stops soon and did not begin the request."""


class ReplicaConnection:
    """One connection; used on one event loop."""

    def __init__(self, secret: bytes) -> None:
        self._protocol = _Protocol(secret)

    async def open(self, address: ReplicaAddress, node_id: str) -> None:
        """Connect: by socket on the same node, else by port. Raises ReplicaLostError."""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self._connect(address, node_id)
                await self._protocol.opened
        except (OSError, TimeoutError, ProtocolError) as error:
            self.close()
            raise ReplicaLostError(f"no connection to {address.host}: {error}") from error

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._protocol.is_open

    @property
    def is_draining(self) -> bool:
        """Whether the replica said that it stops soon."""
        return self._protocol.is_draining

    @property
    def lost(self) -> "asyncio.Future[None]":
        """Done once the connection has ended."""
        return self._protocol.lost

    def generate(self, request: InferenceRequest) -> "ConnectionEvents":
        """Send a request; closing the events cancels it."""
        return self._protocol.generate(request)

    async def embed(self, request: EmbeddingRequest) -> Embedded | Refused:
        """Return vectors. Raises ReplicaLostError or DeclinedError."""
        return await self._protocol.embed(request)

    def close(self) -> None:
        """End the connection and with it every request on it."""
        self._protocol.close()

    def abort(self) -> None:
        """End the connection without what is still to be sent: nobody may read it any more."""
        self._protocol.abort()

    async def _connect(self, address: ReplicaAddress, node_id: str) -> None:
        loop = asyncio.get_running_loop()
        if address.node_id == node_id and Path(address.socket_path).exists():  # noqa: ASYNC240
            await loop.create_unix_connection(lambda: self._protocol, address.socket_path)
        else:
            host, port = address.host, address.port
            transport, _ = await loop.create_connection(lambda: self._protocol, host, port)
            _bound_silence(transport.get_extra_info("socket"))


class ConnectionEvents:
    """Events of one request on one connection; see `serving.messages.Events`."""

    def __init__(self, number: int, protocol: "_Protocol") -> None:
        self._number, self._protocol = number, protocol
        self._arrived: list[Event] = []
        self._is_ended = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        """Return everything that arrived since. Raises ReplicaLostError or DeclinedError."""
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            if self._is_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrived, self._arrived = self._arrived, []
        return arrived

    async def aclose(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._is_ended:
            self._is_ended = True
            self._protocol.cancel(self._number)

    def add(self, events: list[Event]) -> None:
        """Hand over what happened."""
        self._arrived += events
        self._wake()

    def end(self, failure: Exception | None = None) -> None:
        """Say that nothing more will happen, and why if that is wrong."""
        self._is_ended, self._failure = True, failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Protocol(asyncio.Protocol):
    def __init__(self, secret: bytes) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.is_open = self.is_draining = False
        self._handshake = ClientHandshake(secret)
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self._num_asked = 0
        self._streams: dict[int, ConnectionEvents] = {}
        self._embeddings: dict[int, asyncio.Future[Embedded | Refused]] = {}
        self._outbox: list[Ask] = []

    # What the connection asks.

    def generate(self, request: InferenceRequest) -> ConnectionEvents:
        number = self._next_number()
        self._streams[number] = events = ConnectionEvents(number, self)
        self._say(Submit(number, request))
        return events

    async def embed(self, request: EmbeddingRequest) -> Embedded | Refused:
        number = self._next_number()
        answer: asyncio.Future[Embedded | Refused] = self._loop.create_future()
        self._embeddings[number] = answer
        self._say(Embed(number, request))
        try:
            return await answer
        finally:
            if self._embeddings.pop(number, None) is not None:
                self._say(Cancel(number))

    def cancel(self, number: int) -> None:
        if self._streams.pop(number, None) is not None:
            self._say(Cancel(number))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it.

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                if self.is_open:
                    for answer in unpack(answer_decoder, payload):
                        self._take(answer)
                else:
                    self._greet(payload)
        except ProtocolError as error:
            self._fail_opening(error)
            assert self._transport is not None, "data came over it"
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        lost = ReplicaLostError(f"the connection ended: {exc or 'closed by the replica'}")
        self._fail_opening(ProtocolError(str(lost)))
        for events in self._streams.values():
            events.end(lost)
        self._streams.clear()
        for answer in self._embeddings.values():
            if not answer.done():
                answer.set_exception(lost)
        self._embeddings.clear()
        if not self.lost.done():
            self.lost.set_result(None)

    def _greet(self, payload: bytes) -> None:
        assert self._transport is not None, "data came over it"
        frame = self._handshake.answer(payload)
        if frame is not None:
            self._transport.write(frame)
            return
        self.is_open = True
        self._frames.max_bytes = MAX_FRAME_BYTES
        if not self.opened.done():
            self.opened.set_result(None)

    def _fail_opening(self, error: ProtocolError) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # Seen: nobody may be waiting for it any more.

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, Happened):
            if (events := self._streams.get(answer.number)) is not None:
                events.add(answer.events)
        elif isinstance(answer, Ended):
            if (events := self._streams.pop(answer.number, None)) is not None:
                events.end()
        elif isinstance(answer, Draining):
            self.is_draining = True
        elif isinstance(answer, Answered):
            self._finish(answer.number, answer.answer)
        else:
            self._finish(answer.number, DeclinedError())

    def _finish(self, number: int, answer: Embedded | Refused | DeclinedError) -> None:
        future = self._embeddings.pop(number, None)
        if isinstance(answer, DeclinedError):
            if (events := self._streams.pop(number, None)) is not None:
                events.end(answer)
            if future is not None and not future.done():
                future.set_exception(answer)
        elif future is not None and not future.done():
            future.set_result(answer)

    def _next_number(self) -> int:
        if not self.is_open:
            raise ReplicaLostError("the connection is closed")
        self._num_asked += 1
        return self._num_asked

    def _say(self, ask: Ask) -> None:
        if not self.is_open:
            return  # Whoever waits was told that the connection is lost.
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(ask)

    def _flush(self) -> None:
        asks, self._outbox = self._outbox, []
        if asks and self.is_open and self._transport is not None:
            self._transport.write(pack(asks))


def _bound_silence(connected: socket.socket) -> None:
    """Have the system end a connection whose other side acknowledges nothing; see tcp(7)."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":  # Elsewhere the system's own times apply.
        for option, value in (
            (socket.TCP_KEEPIDLE, _PROBE_S),
            (socket.TCP_KEEPINTVL, _PROBE_S),
            (socket.TCP_USER_TIMEOUT, 1000 * _UNANSWERED_S),
        ):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
