"""Who may call what: every route of the OpenAPI document with every kind of wrong key."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from asgi_driver import Connection, ask, drive
from gateway_fakes import KEY, FakeBackend, Gateway
from ledger_fakes import Service
from starlette.routing import Route

from cluster.accounting import Team
from serving.gateway.accounts import Principal, Scope
from serving.gateway.accounts_client import LedgerAccounts
from serving.gateway.app import create_app
from serving.gateway.limits import GatewayLimits
from serving.gateway.rules import RULES, Access, check_rules, find_rule

GATEWAY = Gateway()
CODES = {Access.KEY: "invalid_api_key", Access.TICKET: "invalid_ticket"}


def operations() -> list[tuple[str, str, Access]]:
    return [
        (method.upper(), path, RULES[method.upper(), path].access)
        for path, described in GATEWAY.app.openapi()["paths"].items()
        for method in described
    ]


def authorization(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", key.encode()), (b"content-type", b"application/json")]


# None, empty, of another scheme, wrong, revoked (no longer known), expired (the same to the
# gateway), twice, enormous, not ASCII.
WRONG = {
    "none": [(b"content-type", b"application/json")],
    "empty": authorization("Bearer "),
    "basic": authorization(f"Basic {KEY}"),
    "bare": authorization(KEY),
    "wrong": authorization("Bearer rs-wrong"),
    "prefix": authorization(f"Bearer {KEY[:-1]}"),
    "twice": [*authorization(f"Bearer {KEY}"), *authorization(f"Bearer {KEY}")],
    "enormous": authorization("Bearer " + "x" * 4000),
    "latin": [(b"authorization", b"Bearer \xff\xfe"), (b"content-type", b"application/json")],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("method", "path", "access"), operations())
def test_every_route_when_the_key_is_wrong_is_401_and_only_healthz_is_open(
    method: str, path: str, access: Access, wrong: str
):
    answer = ask(GATEWAY.app, b"{", headers=WRONG[wrong], method=method, path=path)
    if path == "/healthz":
        assert (access, answer.status) == (Access.PUBLIC, 200)
        return
    assert answer.status == 401
    assert answer.headers[b"www-authenticate"] == b"Bearer"
    assert json.loads(answer.body)["error"]["code"] == CODES[access]
    assert "Monday" not in answer.body.decode()


@pytest.mark.parametrize(("method", "path", "access"), operations())
@pytest.mark.parametrize("scope", list(Scope))
def test_every_route_when_the_key_lacks_its_scope_is_403(
    method: str, path: str, access: Access, scope: Scope
):
    gateway = Gateway()
    gateway.accounts.keys["rs-bob"] = Principal("k2", "bob", frozenset({scope}))
    headers = authorization("Bearer rs-bob")
    answer = ask(gateway.app, b"{}", headers=headers, method=method, path=path)
    rule = RULES[method, path]
    is_allowed = not rule.scopes or scope in rule.scopes or scope is Scope.ADMIN
    assert (answer.status == 403) == (access is Access.KEY and not is_allowed)


@pytest.mark.parametrize(("method", "path", "access"), operations())
def test_every_route_when_the_key_was_revoked_a_moment_ago_is_401(
    method: str, path: str, access: Access
):
    gateway = Gateway()
    headers = authorization(f"Bearer {KEY}")
    before = ask(gateway.app, b"{}", headers=headers, method=method, path=path)
    del gateway.accounts.keys[KEY]
    after = ask(gateway.app, b"{}", headers=headers, method=method, path=path)
    assert before.status != 401 or access is Access.TICKET
    assert after.status == (200 if access is Access.PUBLIC else 401)


# --- the same over a real ledger ---------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = Service(str(tmp_path / "ledger.db"))
    yield found
    found.ledger.close()


@pytest.mark.parametrize("reason", ["expired", "revoked", "suspended"])
@pytest.mark.parametrize(("method", "path", "access"), operations())
def test_every_route_when_the_key_in_the_ledger_does_not_count_any_more_is_401(
    service: Service, method: str, path: str, access: Access, reason: str
):
    scopes = frozenset({Scope.INFERENCE, Scope.METRICS})
    key, secret = service.new_key(scopes=scopes, expires_s=int(service.clock()) + 10)

    async def test(accounts: LedgerAccounts) -> None:
        app = create_app(FakeBackend(), accounts, GatewayLimits())
        asked = {"method": method, "path": path, "headers": authorization(f"Bearer {secret}")}
        before = await drive(app, Connection(b"{"), **asked)
        assert before.status != 401 or access is Access.TICKET
        if reason == "expired":
            service.clock.now_s += 10
        elif reason == "revoked":
            service.ledger.revoke_key(key.id)
        else:
            service.ledger.change_team("a", lambda team: team.replace(is_suspended=True))
        after = await drive(app, Connection(b"{"), **asked)
        assert after.status == (200 if access is Access.PUBLIC else 401)
        if access is not Access.PUBLIC:
            assert json.loads(after.body)["error"]["code"] == CODES[access]
            assert reason not in after.body.decode()

    service.run(test)


@pytest.mark.parametrize(("method", "path", "access"), operations())
def test_every_route_when_the_key_in_the_ledger_is_of_another_team_tells_nothing_of_this_one(
    service: Service, method: str, path: str, access: Access
):
    service.ledger.add_team(Team(name="b"))
    scopes = frozenset({Scope.INFERENCE, Scope.METRICS})
    _, secret = service.new_key(team="b", scopes=scopes)

    async def test(accounts: LedgerAccounts) -> None:
        app = create_app(FakeBackend(), accounts, GatewayLimits())
        asked = {"method": method, "path": path, "headers": authorization(f"Bearer {secret}")}
        of_other = await drive(app, Connection(b"{"), query_string=b"team=a", **asked)
        rule = RULES[method, path]
        expected = 401 if access is Access.TICKET else 403 if rule.is_of_team else None
        of_own = await drive(app, Connection(b"{"), query_string=b"team=b", **asked)
        assert of_other.status == (expected or of_own.status)
        assert of_own.status not in {401, 403} or access is Access.TICKET
        assert service.key.id not in of_other.body.decode()

    service.run(test)


@pytest.mark.parametrize("query", [b"team=alice", b"team=bob&team=alice", b"team=%61lice"])
def test_usage_when_another_team_is_asked_for_is_403(query: bytes):
    gateway = Gateway()
    gateway.accounts.keys["rs-bob"] = Principal("k2", "bob", frozenset({Scope.INFERENCE}))
    answer = ask(
        gateway.app,
        headers=authorization("Bearer rs-bob"),
        method="GET",
        path="/v1/usage",
        query_string=query,
    )
    assert answer.status == 403


def test_usage_when_it_is_the_own_team_or_an_administrator_asks_is_shown():
    gateway = Gateway()
    assert gateway.call("GET", "/v1/usage").json() == {"team": "alice", "used_tokens": 6}
    assert gateway.call("GET", "/v1/usage?team=bob").json()["team"] == "bob"
    missing = gateway.call("GET", "/v1/usage?team=nobody")
    assert missing.status_code == 404
    assert "nobody" in missing.json()["error"]["message"]
    broken = gateway.call("GET", "/v1/usage?team=broken")
    assert (broken.status_code, "secret" in broken.text) == (503, False)


def test_models_when_a_team_may_ask_some_are_hidden_and_refused():
    gateway = Gateway()
    mine = frozenset({"mini"})
    gateway.accounts.keys[KEY] = Principal("k1", "alice", frozenset({Scope.INFERENCE}), mine)
    assert [m["id"] for m in gateway.call("GET", "/v1/models").json()["data"]] == ["mini"]
    assert gateway.call("GET", "/v1/models/tiny").status_code == 404
    refused = gateway.complete()
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].endswith("there is: `mini`.")


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/v1/models/", "/docs/", "//healthz", "/healthz/"]
)
def test_unknown_path_when_called_without_a_key_is_401_and_with_one_404(path: str):
    assert ask(GATEWAY.app, headers=WRONG["none"], method="GET", path=path).status == 401
    assert ask(GATEWAY.app, method="GET", path=path).status == 404


def test_healthz_when_another_method_is_used_needs_a_key():
    assert ask(GATEWAY.app, headers=WRONG["none"], method="DELETE", path="/healthz").status == 401
    assert ask(GATEWAY.app, method="DELETE", path="/healthz").status == 405


def test_gateway_when_a_route_has_no_rule_does_not_start():
    async def endpoint(request: object) -> None:
        del request

    routes = [*GATEWAY.app.routes, Route("/v1/new", endpoint, methods=["POST"])]
    with pytest.raises(AssertionError, match=r"without a rule.*/v1/new"):
        check_rules(routes)
    with pytest.raises(AssertionError, match=r"without a route.*/healthz"):
        check_rules([r for r in GATEWAY.app.routes if getattr(r, "path", "") != "/healthz"])


def test_application_when_made_has_checked_its_rules():
    app = create_app(GATEWAY.backend, GATEWAY.accounts, GatewayLimits())
    check_rules(app.routes)
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []}
    path, rule = find_rule(app.routes, scope)
    assert (path, rule) == ("/v1/embeddings", RULES["POST", "/v1/embeddings"])
    assert dataclasses.replace(rule, is_work=False).scopes == {Scope.INFERENCE}


def test_websocket_when_opened_is_closed_without_a_word():
    answer = ask(GATEWAY.app, type="websocket", path="/v1/models")
    assert answer.sent == [{"type": "websocket.close", "code": 1008}]
