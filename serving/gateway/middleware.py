"""What every request passes before its route: bounds, keys, counting. Plain ASGI.

Takes an ASGI application; gives one that refuses early. It does not know the routes' bodies.
(Starlette's BaseHTTPMiddleware would hide from a route that its client left.)
"""

import logging
import time
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import ConfigError
from serving.gateway import errors
from serving.gateway.auth import KeyRing
from serving.gateway.metrics import GatewayMetrics
from serving.messages import Refused

_logger = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
ROUTES = OPEN_PATHS | {"/v1/models", "/v1/completions", "/v1/chat/completions"}
# Ray Serve's proxy obeys these, so that a client could keep work running after it left.
_STEERING_HEADERS = ("x-request-disconnect-disabled", "x-request-timeout-seconds")


class Counting:
    """Counts and times every request, and logs those that fail here."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A client that leaves before any answer is counted as nginx does: 499.
        status, started = 499, time.monotonic()

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        except Exception:
            status = 500  # The framework answers outside of this layer.
            raise
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._metrics.answered(route, status, time.monotonic() - started)


class Bounds:
    """Refuses bodies over a size, and headers that would steer Ray Serve from outside."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        steering = [name for name in _STEERING_HEADERS if name in headers]
        if steering:
            message = f"the header `{steering[0]}` is not allowed. Leave it out."
            refused = Refused(HTTPStatus.BAD_REQUEST, message)
            await errors.response(refused)(scope, receive, send)
            return
        body = await self._read(receive)
        if body is None:
            await errors.response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the whole body, or None if it is too large."""
        body = bytearray()
        has_more = True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body)
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                return None
        return bytes(body)

    def _too_large(self) -> Refused:
        return Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body exceeds {self._max_body_bytes} bytes. Send a shorter prompt.",
            code="request_too_large",
        )


class Authentication:
    """Lets through who has a key; the key's name is `scope["state"]["key_name"]` from here on."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            name = self._owner(Headers(scope=scope).get("authorization", ""))
        except ConfigError as error:
            _logger.error("no request can be admitted: %s", error.message)  # noqa: TRY400
            refused = Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "the server cannot check API keys now."
            )
            await errors.response(refused)(scope, receive, send)
            return
        if name is None:
            await errors.response(_UNAUTHORIZED)(scope, receive, send)
            return
        scope.setdefault("state", {})["key_name"] = name
        await self._app(scope, receive, send)

    def _owner(self, header: str) -> str | None:
        scheme, _, key = header.partition(" ")
        return self._keys.owner(key.strip()) if scheme.lower() == "bearer" else None


_UNAUTHORIZED = Refused(
    HTTPStatus.UNAUTHORIZED,
    "no valid API key. Send the header `Authorization: Bearer KEY`.",
    code="invalid_api_key",
)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body at once, and then what the client does."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
