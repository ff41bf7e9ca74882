"""Requests that are too large, too slow, ambiguous or meant to steer Ray Serve. Plain ASGI.

Takes an ASGI application; gives one that sees whole, bounded, unambiguous requests only. It does
not know routes or keys. (Starlette's BaseHTTPMiddleware would hide that a client left.)
"""

import asyncio
import re
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.gateway.call import call_of
from serving.gateway.errors import RefusedError
from serving.gateway.limits import GatewayLimits
from serving.gateway.responses import RefusalResponse
from serving.messages import Refused

# Ray Serve's proxies obey these; a client must not (Ray 2.60, serve/_private/proxy.py).
_STEERING = re.compile(
    rb"x-request-timeout-seconds|x-request-disconnect-disabled|serve[_-]multiplexed[_-]model[_-]id"
    rb"|x-session-id|x-serve-.*|x-request-id"
)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


class CleanHeaders:
    """Refuses oversized or ambiguous headers and drops those that steer Ray Serve."""

    def __init__(self, app: ASGIApp, limits: GatewayLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._problem(scope["headers"])
        if refused is not None:
            await RefusalResponse(refused, closes=True)(scope, receive, send)
            return
        kept = [pair for pair in scope["headers"] if not _STEERING.fullmatch(pair[0])]
        scope["headers"] = kept
        await self._app(scope, receive, send)

    def _problem(self, headers: list[tuple[bytes, bytes]]) -> Refused | None:
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._limits.max_headers or size > self._limits.max_header_bytes:
            return Refused(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"{len(headers)} headers of {size} bytes; at most {self._limits.max_headers} of "
                f"{self._limits.max_header_bytes} bytes are taken.",
            )
        lengths = [value for name, value in headers if name == b"content-length"]
        codings = [value for name, value in headers if name == b"transfer-encoding"]
        # Servers that disagree on where a body ends can be made to see two requests in one:
        # RFC 9112, section 6.3.
        is_ambiguous = len(lengths) + len(codings) > 1
        if is_ambiguous or any(not _LENGTH.fullmatch(length) for length in lengths):
            message = "`Content-Length` and `Transfer-Encoding` contradict each other or repeat."
            return Refused(HTTPStatus.BAD_REQUEST, f"{message} Send one of them, once.")
        return None


class WholeBodies:
    """Reads a body within its bounds of size, time and depth, and hands it on in one piece.

    Only of a request that holds a place, so that bodies in memory are as few as places. Whatever
    else is asked has no body for the application: an answer needs none of it.
    """

    def __init__(self, app: ASGIApp, limits: GatewayLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if call_of(scope).place is None:
            await self._app(scope, _replay(b"", receive), send)
            return
        headers = dict(scope["headers"])
        try:
            self._check_kind(headers)
            async with asyncio.timeout(self._limits.body_timeout_s):
                body = await self._read(receive)
        except RefusedError as error:
            await RefusalResponse(error.refused, closes=True)(scope, receive, send)
            return
        except TimeoutError:
            await RefusalResponse(self._too_slow(), closes=True)(scope, receive, send)
            return
        if body is None:
            return  # The client left; nobody reads an answer.
        call_of(scope).body_bytes = len(body)
        if is_deeper(body, self._limits.max_json_depth):
            await RefusalResponse(self._too_deep())(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_kind(self, headers: dict[bytes, bytes]) -> None:
        if int(headers.get(b"content-length", b"0")) > self._limits.max_body_bytes:
            raise RefusedError(self._too_large())
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if not _JSON.fullmatch(kind):
            message = "a JSON body is required. Send the header `Content-Type: application/json`."
            raise RefusedError(Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message))

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or None if the client left."""
        parts, size, has_more = [], 0, True
        while has_more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            has_more = message.get("more_body", False)
            if size > self._limits.max_body_bytes:
                raise RefusedError(self._too_large())
        return b"".join(parts)

    def _too_large(self) -> Refused:
        return Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body exceeds {self._limits.max_body_bytes} bytes. Send a shorter prompt.",
            code="request_too_large",
        )

    def _too_slow(self) -> Refused:
        return Refused(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the body did not arrive within {self._limits.body_timeout_s:g} s. Send it faster.",
            code="request_timeout",
        )

    def _too_deep(self) -> Refused:
        return Refused(
            HTTPStatus.BAD_REQUEST,
            f"the body is nested deeper than {self._limits.max_json_depth} levels.",
        )


def is_deeper(body: bytes, max_depth: int) -> bool:
    """Return whether a JSON text nests deeper; unbalanced texts may count as deeper.

    Every step is one pass over what is left, in C, however hostile the text is.
    """
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return False
    brackets = _STRING.sub(b"", body).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(max_depth):
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    return bool(brackets)


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
