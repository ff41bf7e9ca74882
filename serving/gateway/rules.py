"""Who may call which route: one table. A route that is not in it stops the gateway from starting.

Takes routes and a principal; gives a rule or a refusal. It does not know how keys are checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from urllib.parse import parse_qs

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope as AsgiScope

from serving.gateway.accounts import Principal, Scope
from serving.messages import Refused


class Access(Enum):
    """What a caller has to bring."""

    PUBLIC = "nothing"
    TICKET = "a one-time address, which a key paid for"
    KEY = "a key"


@dataclass(frozen=True)
class Rule:
    """What one route asks for. A key needs one of `scopes` or `admin`; no scopes: any valid key.

    `is_work`: a request holds a place, from before its body is read; no other body is read at all.
    `is_of_team`: the query field `team` must be the caller's own, unless the key is an
    administrator's.
    """

    access: Access
    scopes: frozenset[Scope] = frozenset()
    is_work: bool = False
    is_of_team: bool = False


_ANY_KEY = Rule(Access.KEY)
_INFERENCE = Rule(Access.KEY, frozenset({Scope.INFERENCE}))
_WORK = Rule(Access.KEY, frozenset({Scope.INFERENCE}), is_work=True)

RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/healthz"): Rule(Access.PUBLIC),
    ("GET", "/readyz"): _ANY_KEY,
    ("GET", "/metrics"): Rule(Access.KEY, frozenset({Scope.METRICS})),
    ("GET", "/openapi.json"): _ANY_KEY,
    ("GET", "/docs"): _ANY_KEY,
    ("GET", "/v1/models"): _INFERENCE,
    ("GET", "/v1/models/{name}"): _INFERENCE,
    ("POST", "/v1/completions"): _WORK,
    ("POST", "/v1/chat/completions"): _WORK,
    ("POST", "/v1/embeddings"): _WORK,
    ("POST", "/v1/event-streams"): _WORK,
    ("GET", "/v1/event-streams/{ticket}"): Rule(Access.TICKET),
    ("GET", "/v1/usage"): Rule(Access.KEY, frozenset({Scope.INFERENCE}), is_of_team=True),
}
# What holds where no route matches: the answer is 404 or 405, but only for who has a key.
NO_ROUTE = _ANY_KEY


def check_rules(routes: Sequence[BaseRoute]) -> None:
    """Assert that every route has a rule and every rule a route."""
    found = set(_endpoints(routes))
    missing = found - RULES.keys()
    assert not missing, f"routes without a rule in serving/gateway/rules.py: {sorted(missing)}"
    stale = RULES.keys() - found
    assert not stale, f"rules in serving/gateway/rules.py without a route: {sorted(stale)}"


def find_rule(routes: Sequence[BaseRoute], scope: AsgiScope) -> tuple[str, Rule]:
    """Return the route that will answer and its rule; by the router's own matching."""
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            assert isinstance(route, Route), "checked at start"
            return route.path, RULES[scope["method"], route.path]
    return "other", NO_ROUTE


def forbidden(rule: Rule, principal: Principal, query: bytes) -> Refused | None:
    """Return why a valid key may not call a route, or None if it may."""
    if Scope.ADMIN in principal.scopes:
        return None
    if rule.scopes and not rule.scopes & principal.scopes:
        wanted = " or ".join(f"`{scope}`" for scope in sorted(rule.scopes))
        return _forbidden(f"this key lacks the scope {wanted}. Use another key, or ask for one.")
    if rule.is_of_team and _teams(query) - {principal.team}:
        return _forbidden("this key may only ask about its own team. Leave `team` out.")
    return None


def _teams(query: bytes) -> set[str]:
    return set(parse_qs(query.decode("latin-1"), keep_blank_values=True).get("team", ()))


def _forbidden(message: str) -> Refused:
    return Refused(HTTPStatus.FORBIDDEN, message, code="insufficient_permissions")


def _endpoints(routes: Sequence[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in routes:
        assert isinstance(route, Route), f"{route}: only plain routes can have a rule"
        for method in route.methods or ("ANY",):
            yield method, route.path
