"""A replica's listening side: connections of gateways, many requests on each.

Takes what answers requests and a secret; gives addresses that gateways can connect to. Everything
that happens in one turn of the event loop, to all requests of a connection, leaves in one write;
where many streams are open, tokens of a few turns do. It does not know Ray, engines or where
gateways learn the addresses.
"""

import asyncio
import logging
import os
import stat
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Protocol, cast

from cluster.errors import StorageError
from serving.frames import (
    MAX_FRAME_BYTES,
    Answer,
    Answered,
    Ask,
    Cancel,
    Declined,
    Draining,
    Embed,
    Ended,
    Frames,
    Happened,
    ProtocolError,
    ServerHandshake,
    Submit,
    ask_decoder,
    pack,
    unpack,
)
from serving.messages import (
    GENERATION_FAILED,
    Delta,
    Embedded,
    EmbeddingRequest,
    Event,
    InferenceRequest,
    Message,
    Refused,
)

_logger = logging.getLogger(__name__)
_HANDSHAKE_TIMEOUT_S = 5.0
# A gateway that reads nothing is given up, rather than keeping its tokens in memory.
_MAX_UNREAD_BYTES = 2 * MAX_FRAME_BYTES
# With so many streams a pass takes 10 ms or more, and every write costs the gateway and the client
# as much as the token in it: tokens in the middle of an answer wait for the next pass's.
_MANY_STREAMS = 8
_WAIT_S = 0.03
_FAILED = Refused(
    HTTPStatus.INTERNAL_SERVER_ERROR, "the replica failed at this request.", code=GENERATION_FAILED
)


class Answering(Protocol):
    """What a replica does with requests."""

    def generate(self, request: InferenceRequest) -> AsyncGenerator[list[Event], None]:
        """Yield what happens; closing cancels."""
        ...

    async def embed(self, request: EmbeddingRequest) -> Embedded | Refused:
        """Return vectors; cancelling the call cancels the work."""
        ...


class ReplicaAddress(Message, frozen=True):
    """Where a replica listens: a socket for its own node, a port for the others."""

    node_id: str
    socket_path: str
    host: str
    port: int


class ReplicaServer:
    """Serves one replica to any number of gateways; used on one event loop."""

    def __init__(self, answering: Answering, secret: bytes, wait_s: float = _WAIT_S) -> None:
        """Answer gateways that know the secret; tokens of many streams wait `wait_s` at most."""
        self._answering = answering
        self._secret = secret
        self.wait_s = wait_s
        self._servers: list[asyncio.Server] = []
        self._sessions: set[_Session] = set()
        self._socket_path: Path | None = None
        self._idle = asyncio.Event()
        self.is_draining = False

    @property
    def num_open(self) -> int:
        """Requests in work."""
        return sum(session.num_open for session in self._sessions)

    async def start(self, socket_path: Path, host: str, node_id: str) -> ReplicaAddress:
        """Listen on a socket that only this user can reach, and on a free port of `host`."""
        loop = asyncio.get_running_loop()
        self._socket_path = socket_path
        self._servers.append(await loop.create_unix_server(self._session, str(socket_path)))
        server = await loop.create_server(self._session, host, 0)
        self._servers.append(server)
        port = server.sockets[0].getsockname()[1]
        return ReplicaAddress(node_id, str(socket_path), host, port)

    async def drain(self, timeout_s: float) -> int:
        """Begin nothing new and wait for what runs; return how many requests are left."""
        self.is_draining = True
        for session in self._sessions:
            session.say(Draining())
        self.note_end()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self.num_open

    def note_end(self) -> None:
        """Take note that a request may have been the last one."""
        if self.is_draining and self.num_open == 0:
            self._idle.set()

    async def close(self) -> None:
        """Stop listening and end every connection; gateways continue what ran elsewhere."""
        for server in self._servers:
            server.close()
        for session in list(self._sessions):
            session.end()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)

    def _session(self) -> "_Session":
        return _Session(self, self._answering, self._secret, self._sessions)


class _Session(asyncio.Protocol):
    """One gateway's connection."""

    def __init__(
        self,
        server: ReplicaServer,
        answering: Answering,
        secret: bytes,
        sessions: set["_Session"],
    ) -> None:
        self._server, self._answering, self._sessions = server, answering, sessions
        self._loop = asyncio.get_running_loop()
        self._handshake: ServerHandshake | None = ServerHandshake(secret)
        self._frames = Frames()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outbox: list[Answer] = []
        self._is_flush_due = False
        self._waiting: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self._timeout: asyncio.TimerHandle

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it.
        self._timeout = self._loop.call_later(_HANDSHAKE_TIMEOUT_S, self._transport.abort)
        assert self._handshake is not None, "a connection begins with its handshake"
        self._transport.write(self._handshake.hello())

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                if self._handshake is not None:
                    self._transport.write(self._handshake.answer(payload))
                    self._admit()
                    continue
                for ask in unpack(ask_decoder, payload):
                    self._take(ask)
        except ProtocolError as error:
            _logger.warning("a connection was refused: %s", error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._timeout.cancel()
        self._sessions.discard(self)
        for task in self._tasks.values():
            task.cancel()

    def say(self, answer: Answer) -> None:
        """Send with whatever else happens in this turn of the event loop."""
        self._outbox.append(answer)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def say_soon(self, answer: Answer) -> None:
        """Send with what is said next, but within the server's `wait_s`."""
        self._outbox.append(answer)
        if self._waiting is None and not self._is_flush_due:
            self._waiting = self._loop.call_later(self._server.wait_s, self._flush)

    def end(self) -> None:
        """Send what was said and close."""
        if self._outbox:
            self._flush()
        self._transport.close()

    def _admit(self) -> None:
        self._handshake = None
        self._frames.max_bytes = MAX_FRAME_BYTES
        self._timeout.cancel()
        self._sessions.add(self)
        if self._server.is_draining:
            self.say(Draining())

    def _take(self, ask: Ask) -> None:
        if isinstance(ask, Cancel):
            if (task := self._tasks.get(ask.number)) is not None:
                task.cancel()
            return
        if ask.number in self._tasks:
            raise ProtocolError(f"a second request {ask.number}")
        if self._server.is_draining:
            self.say(Declined(ask.number))
            return
        number = ask.number
        self._tasks[number] = task = self._loop.create_task(self._run(ask))

        def forget(_: asyncio.Task[None]) -> None:
            del self._tasks[number]
            self._server.note_end()

        task.add_done_callback(forget)

    async def _run(self, ask: Submit | Embed) -> None:
        try:
            if isinstance(ask, Submit):
                await self._generate(ask)
            else:
                self.say(Answered(ask.number, await self._answering.embed(ask.request)))
        except asyncio.CancelledError:
            raise
        except BaseException:  # A panic of Rust code is no Exception.
            _logger.exception("a request failed in an unforeseen way")
            if isinstance(ask, Submit):
                self.say(Happened(ask.number, [_FAILED]))
                self.say(Ended(ask.number))
            else:
                self.say(Answered(ask.number, _FAILED))

    async def _generate(self, ask: Submit) -> None:
        async with aclosing(self._answering.generate(ask.request)) as batches:
            async for batch in batches:
                can_wait = len(self._tasks) >= _MANY_STREAMS and _is_middle(batch)
                say = self.say_soon if can_wait else self.say
                say(Happened(ask.number, batch))
        self.say(Ended(ask.number))

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        self._is_flush_due = False
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
        if not outbox or self._transport.is_closing():
            return
        self._transport.write(pack(outbox))
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            _logger.warning("a gateway reads nothing: its connection is given up")
            self._transport.abort()


def _is_middle(batch: list[Event]) -> bool:
    """Say whether a batch neither begins an answer (Started) nor ends a choice of it."""
    return all(isinstance(event, Delta) and event.finish_reason is None for event in batch)


def socket_folder(base: Path) -> Path:
    """Return this user's folder of sockets below `base`, made with mode 0700 if need be.

    Sockets of processes that are gone are removed. Raises StorageError if the folder is another
    user's or open to others.
    """
    folder = base / f"raysmith-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StorageError(
            f"{folder} has to be a folder of this user with mode 0700: replicas' sockets lie "
            "there. Remove it, or set TMPDIR to a folder of your own."
        )
    for path in folder.glob("*.sock"):
        pid = path.name.partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)
    return folder
