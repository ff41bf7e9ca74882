"""Responses of the gateway: JSON made fast, and refusals that the request's log learns of.

Takes documents and refusals; gives ASGI responses. It does not know what they say.
"""

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.gateway import errors
from serving.gateway.call import call_of
from serving.messages import Refused

_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    """A document."""

    media_type = "application/json"

    def __init__(self, document: Mapping[str, object], status: int = HTTPStatus.OK) -> None:
        super().__init__(_encode(document), int(status))


class RefusalResponse(JsonResponse):
    """The whole answer to a request that was refused."""

    def __init__(self, refused: Refused, *, closes: bool = False) -> None:
        """Render a refusal; `closes`: the connection's state is unknown, so it ends here."""
        super().__init__(errors.document(refused), refused.status)
        self._refused = refused
        if refused.retry_after_s is not None:
            self.headers["Retry-After"] = str(refused.retry_after_s)
        if refused.status is HTTPStatus.UNAUTHORIZED:
            self.headers["WWW-Authenticate"] = "Bearer"
        if closes:
            self.headers["Connection"] = "close"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it and note it for the log."""
        call_of(scope).refused = self._refused
        await super().__call__(scope, receive, send)
