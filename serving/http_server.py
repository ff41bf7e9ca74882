"""The gateway's own HTTP port: uvicorn on uvloop, with bounds that uvicorn does not have.

Takes an ASGI application; answers on a port until it is stopped. Time and size of a request's head
are bounded here, before any application sees it. It does not know what the application does.
"""

import asyncio
import socket
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import PortTakenError

MAX_HEAD_BYTES = 32 * 2**10
_HEAD_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 75
_MAX_CONNECTIONS = 4096
_BACKLOG = 1024
_STARTUP_POLL_S = 0.01
_FAREWELL_TIMEOUT_S = 2.0


class HttpServer:
    """Serves one application; used on one event loop."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, *, head_timeout_s: float = _HEAD_TIMEOUT_S
    ) -> None:
        """Bind the port, 0 for a free one. Raises PortTakenError.

        A port may be bound by an old and a new gateway of one user at a time, so that one can
        replace the other while connections go on coming in.
        """
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], partial(BoundedHttp, head_timeout_s)),
            ws="none",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            limit_concurrency=_MAX_CONNECTIONS,
            backlog=_BACKLOG,
        )
        self._server = uvicorn.Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once connections are answered."""
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110 - no event
            await asyncio.sleep(_STARTUP_POLL_S)
        if self._serving.done():
            await self._serving
            raise PortTakenError(f"the gateway did not start on port {self.port}; see its log.")

    @property
    def has_started(self) -> bool:
        """Whether it was started, though it may have ended since."""
        return self._serving is not None

    @property
    def is_serving(self) -> bool:
        """Whether connections are answered."""
        return self._serving is not None and not self._serving.done()

    async def stop(self, drain_s: float) -> None:
        """Accept nothing new, let answers end within `drain_s`, then cut the rest.

        What is cut may still say so to its client and settle its account.
        """
        self._server.config.timeout_graceful_shutdown = max(1, round(drain_s))
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        if cut := set(self._server.server_state.tasks):
            await asyncio.wait(cut, timeout=_FAREWELL_TIMEOUT_S)
        self._socket.close()


class BoundedHttp(HttpToolsProtocol):
    """Ends connections whose request heads take too long or grow too large.

    A connection without a request at work always has a timer that its client cannot stop: uvicorn's
    own ends with the first byte, whatever that belongs to.
    """

    def __init__(self, head_timeout_s: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._rest_timer: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as uvicorn narrows it
        self, transport: asyncio.Transport
    ) -> None:
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._forget_head()
        self._forget_rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head; what belongs to no message is waited out like one."""
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's head is too large.")
            self._forget_head()
        elif self._is_untimed:  # Empty lines, which the parser passes over.
            self._expect_head()

    def on_message_begin(self) -> None:
        """Begin to wait for a further head."""
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """Stop waiting."""
        self._forget_head()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of a body, which nobody reads any more, as long as for a head."""
        # While others wait in the pipeline, `cycle` is one of them, and what ended was whole.
        is_cut = not self.pipeline and self.cycle.more_body
        super().on_response_complete()
        if is_cut and not self.transport.is_closing():
            self._rest_timer = self.loop.call_later(self._head_timeout_s, self._give_up)

    def on_message_complete(self) -> None:
        """Begin to wait for a further head where a body came whole after its answer."""
        super().on_message_complete()
        if self._rest_timer is not None:
            self._forget_rest()
            self._expect_head()

    @property
    def _is_untimed(self) -> bool:
        is_idle = self.cycle is None or self.cycle.response_complete
        is_timed = self._head_timer is not None or self._rest_timer is not None
        return is_idle and not is_timed and not self.transport.is_closing()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._give_up)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _forget_rest(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _give_up(self) -> None:
        self._head_timer = self._rest_timer = None
        self.transport.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise PortTakenError(
            f"the gateway cannot listen on {host} port {port}: {error.strerror}. Stop what "
            "listens there, or choose another `port`."
        ) from None
    return bound
