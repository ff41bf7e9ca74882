"""The outermost layer: a request's id, its count, its log line, its trace, and no stack trace.

Takes an ASGI application; gives one whose every request is seen and whose bugs end here. It does
not know routes or bodies.
"""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.gateway.call import Call, begin_call
from serving.gateway.errors import REFUSED_INTERNALLY
from serving.gateway.logs import log_call
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.responses import RefusalResponse
from serving.gateway.telemetry import Tracer

_logger = logging.getLogger(__name__)
# A client that leaves before any answer is counted as nginx does.
CLIENT_CLOSED_REQUEST = 499


class Observing:
    """Sees every request from its first to its last byte."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, tracer: Tracer) -> None:
        self._app, self._metrics, self._tracer = app, metrics, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        call = begin_call(scope)
        status = CLIENT_CLOSED_REQUEST
        request_id = (b"x-request-id", call.request_id.encode())

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), request_id]
            await send(message)

        with self._tracer.span(scope, call) as span:
            try:
                await self._app(scope, receive, observed_send)
            except Exception:
                _logger.exception("%s %s failed", scope["method"], call.route)
                if status == CLIENT_CLOSED_REQUEST:
                    await RefusalResponse(REFUSED_INTERNALLY)(scope, receive, observed_send)
            finally:
                span.end(call, status)
                self._finish(scope["method"], call, status)

    def _finish(self, method: str, call: Call, status: int) -> None:
        duration_s = time.monotonic() - call.started_s
        self._metrics.answered(call, status, duration_s)
        log_call(method, call, status, duration_s)
