"""The door: a key or a ticket, the route's rule, and a place for work, before a body is read.

Takes an ASGI application and its routes; gives one that lets through who may. It does not know how
keys are kept or what the routes do.
"""

import logging
from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import RaysmithError
from serving.gateway.accounts import KEYS_UNAVAILABLE, UNAUTHORIZED, Accounts, Principal
from serving.gateway.call import Call, call_of
from serving.gateway.errors import RefusedError
from serving.gateway.limits import Admission
from serving.gateway.responses import RefusalResponse
from serving.gateway.rules import Access, Rule, find_rule, forbidden

_logger = logging.getLogger(__name__)
_MOST_KEY_CHARACTERS = 256


class AccessControl:
    """Holds every request to its route's rule."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], accounts: Accounts, admission: Admission
    ) -> None:
        self._app, self._routes = app, routes
        self._accounts, self._admission = accounts, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = call_of(scope)
        call.route, rule = find_rule(self._routes, scope)
        try:
            await self._admit(call, rule, scope)
        except RefusedError as error:
            await RefusalResponse(error.refused)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if call.place is not None:
                call.place.leave()

    async def _admit(self, call: Call, rule: Rule, scope: Scope) -> None:
        if rule.access is not Access.KEY:
            return
        call.secret = _bearer(Headers(scope=scope))
        call.principal = await authenticate(self._accounts, call.secret)
        refused = forbidden(rule, call.principal, scope["query_string"])
        if refused is not None:
            raise RefusedError(refused)
        if rule.is_work:
            call.place = self._admission.enter(call.team)


async def authenticate(accounts: Accounts, secret: str) -> Principal:
    """Return who holds a key. Raises RefusedError: 401 without a reason, or 503."""
    try:
        return await accounts.authenticate(secret)
    except RefusedError as error:
        is_wrong_key = error.refused.status is HTTPStatus.UNAUTHORIZED
        raise RefusedError(UNAUTHORIZED if is_wrong_key else error.refused) from None
    except RaysmithError as error:
        _logger.error("no request can be admitted: %s", error.message)  # noqa: TRY400 - no bug
        raise RefusedError(KEYS_UNAVAILABLE) from None


def _bearer(headers: Headers) -> str:
    given = headers.getlist("authorization")
    scheme, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not 0 < len(secret) <= _MOST_KEY_CHARACTERS:
        raise RefusedError(UNAUTHORIZED)
    return secret
