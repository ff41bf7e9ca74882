"""Requests that are too large, too slow, ambiguous or steering."""

import asyncio
import json

import pytest
from asgi_driver import AUTHORIZED, JSON, Connection, ask, drive
from gateway_fakes import KEY, Gateway

from serving.gateway.hardening import CleanHeaders, is_deeper
from serving.gateway.limits import GatewayLimits

BODY = b'{"model": "tiny", "prompt": "x"}'


def test_call_when_answered_has_an_id_made_here():
    gateway = Gateway()
    answers = [
        ask(gateway.app, BODY, headers=[AUTHORIZED, JSON, (b"x-request-id", b"mine")])
        for _ in range(2)
    ]
    ids = [answer.headers[b"x-request-id"] for answer in answers]
    assert ids[0] != ids[1]
    assert b"mine" not in ids
    assert json.loads(answers[0].body)["id"] == f"cmpl-{ids[0].decode()}"
    assert [asked.request_id.encode() for asked in gateway.backend.asked] == ids


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"x-session-id",
        b"x-serve-anything",
    ],
)
def test_call_when_a_header_steers_ray_serve_is_answered_without_it(name: bytes):
    seen = []

    async def inner(scope, receive, send):
        del receive, send
        seen.append(scope["headers"])

    ask(CleanHeaders(inner, GatewayLimits()), headers=[AUTHORIZED, JSON, (name, b"1")])
    assert seen == [[AUTHORIZED, JSON]]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"32"), (b"content-length", b"32")],
        [(b"content-length", b"32"), (b"content-length", b"5")],
        [(b"content-length", b"32"), (b"transfer-encoding", b"chunked")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"identity")],
        [(b"content-length", b"-1")],
        [(b"content-length", b"+32")],
        [(b"content-length", b"3_2")],
        [(b"content-length", b"32, 32")],
        [(b"content-length", b"9" * 5000)],
    ],
)
def test_call_when_its_length_is_ambiguous_is_400_and_ends_the_connection(headers):
    answer = ask(Gateway().app, BODY, headers=[AUTHORIZED, JSON, *headers])
    assert answer.status == 400
    assert answer.headers[b"connection"] == b"close"


@pytest.mark.parametrize(
    "headers", [[(b"a%d" % i, b"b") for i in range(65)], [(b"a", b"b" * 17_000)]]
)
def test_call_when_headers_are_many_or_large_is_431(headers):
    assert ask(Gateway().app, BODY, headers=[AUTHORIZED, JSON, *headers]).status == 431


@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/x-www-form-urlencoded"])
def test_post_when_it_is_not_said_to_be_json_is_415(kind: bytes):
    answer = ask(Gateway().app, BODY, headers=[AUTHORIZED, (b"content-type", kind)])
    assert answer.status == 415
    assert "application/json" in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("is_announced", [True, False])
def test_post_when_body_is_too_large_is_413_before_it_is_read(is_announced):
    gateway = Gateway(max_body_bytes=100)
    length = [(b"content-length", b"101")] if is_announced else []
    connection = Connection(b"x" * 60, b"x" * 60, b"x" * 60, is_ended=False)

    async def run():
        return await drive(gateway.app, connection, headers=[AUTHORIZED, JSON, *length])

    assert asyncio.run(run()).status == 413
    assert len(connection._messages) == (3 if is_announced else 1)
    assert gateway.backend.asked == []


def test_post_when_body_is_slow_is_408_and_gives_its_place_back():
    gateway = Gateway(body_timeout_s=0.01, max_accepted_choices=1)

    async def run():
        slow = await drive(gateway.app, Connection(b"{", is_ended=False))
        return slow, await drive(gateway.app, Connection(BODY))

    slow, next_one = asyncio.run(run())
    assert (slow.status, slow.headers[b"connection"]) == (408, b"close")
    assert next_one.status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/nothing", 404),
        ("PUT", "/v1/completions", 405),
        ("PATCH", "/v1/models", 405),
        ("GET", "/v1/models", 200),
    ],
)
def test_call_when_its_route_takes_no_body_is_answered_without_reading_one(method, path, status):
    connection = Connection(b"{", b"x" * 60, is_ended=False)

    async def run():
        return await drive(Gateway().app, connection, method=method, path=path)

    assert asyncio.run(run()).status == status
    assert len(connection._messages) == 2


def test_event_stream_when_its_address_is_made_gives_its_place_back():
    gateway = Gateway(max_accepted_choices=1)
    body = {"endpoint": "/v1/completions", "body": json.loads(BODY)}
    for _ in range(2):
        assert gateway.call("POST", "/v1/event-streams", json=body).status_code == 201


def test_post_when_client_leaves_before_its_body_ends_is_not_answered():
    connection = Connection(b"{", is_ended=False)

    async def run():
        connection.left.set()
        return await drive(Gateway().app, connection)

    assert asyncio.run(run()).sent == []


@pytest.mark.parametrize(
    ("body", "depth", "expected"),
    [
        (b"[" * 3 + b"]" * 3, 3, False),
        (b"[" * 4 + b"]" * 4, 3, True),
        (b'{"a": [{"b": 1}]}', 3, False),
        (b'{"a": [{"b": []}]}', 3, True),
        (b"[[],[],[],[],[]]", 2, False),
        (b'["[[[[[[[["]', 1, False),
        (b'["\\"[[[[[[[["]', 1, False),
        (b'["\\\\", [[]]]', 2, True),
        (b'"[[[[[', 2, False),
        (b"[[[[", 2, True),
        (b"", 1, False),
    ],
)
def test_is_deeper_when_text_nests_counts_levels_outside_strings(body, depth, expected):
    assert is_deeper(body, depth) is expected


@pytest.mark.parametrize("piece", [b"[", b"[]", b'"', b'\\"', b"{", b"[[]", b"]"])
def test_is_deeper_when_text_is_hostile_is_quick(piece: bytes):
    # Not a time but a bound on passes: each is linear, and there are at most `max_depth`.
    assert is_deeper(piece * 500_000, 64) in (True, False)


def test_post_when_json_nests_too_deep_is_400():
    deep = b'{"model": "tiny", "prompt": "x", "metadata": ' + b"[" * 65 + b"]" * 65 + b"}"
    answer = ask(Gateway().app, deep)
    assert answer.status == 400
    assert "64 levels" in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("header", ["0", "-5", "soon", "99999999999", "1.5", ""])
def test_deadline_when_header_is_no_number_is_400(header: str):
    gateway = Gateway()
    body = {"model": "tiny", "prompt": "x"}
    headers = {"x-deadline-ms": header, "authorization": f"Bearer {KEY}"}
    answer = gateway.call("POST", "/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-deadline-ms"
