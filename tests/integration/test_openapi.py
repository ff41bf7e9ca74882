"""The OpenAPI document against the gateway: random requests, its own examples, malformed bodies."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from asgi_driver import AUTHORIZED, JSON, Connection, drive
from gateway_fakes import KEY, FakeBackend, Gateway, hello
from hypothesis import HealthCheck, Phase, settings

from serving.gateway import examples

GATEWAY = Gateway()
HEADERS = {"Authorization": f"Bearer {KEY}"}
NUM_MALFORMED = 10_000
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", GATEWAY.app, headers=HEADERS)
CHECKS = (
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.ignored_auth,
)
# Not negative_data_rejection: an unknown query parameter is ignored, as everywhere. What becomes of
# bodies that break the schema is tested below.


@SCHEMA.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_route_when_called_at_random_keeps_to_its_description(case: schemathesis.Case):
    response = case.call_and_validate(headers=HEADERS, checks=CHECKS)
    assert "Traceback" not in response.text


def documented_examples() -> list[Any]:
    found = []
    for path, operations in GATEWAY.app.openapi()["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            named = content.get("application/json", {}).get("examples", {})
            for name, example in named.items():
                found.append(pytest.param(method, path, example["value"], id=f"{path} {name}"))
    return found


def test_every_posting_route_has_examples():
    routes = {param.values[1] for param in documented_examples()}
    paths = GATEWAY.app.openapi()["paths"]
    assert routes == {path for path, operations in paths.items() if "post" in operations}
    assert len(documented_examples()) == sum(
        map(
            len,
            (examples.COMPLETIONS, examples.CHATS, examples.EMBEDDINGS, examples.EVENT_STREAMS),
        )
    )


@pytest.mark.parametrize(("method", "path", "body"), documented_examples())
def test_every_documented_example_when_sent_is_answered_as_described(
    method: str, path: str, body: dict[str, Any]
):
    document = GATEWAY.app.openapi()
    gateway = Gateway(FakeBackend(*hello())) if "logprobs" in body else Gateway()
    response = gateway.call(method.upper(), path, json=body)
    assert response.is_success, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        return
    described = document["paths"][path][method]["responses"][str(response.status_code)]
    schema = described["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": document["components"]}, response.json())


def test_docs_page_when_read_has_every_route_and_example_and_no_script():
    page = GATEWAY.call("GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert "http" not in page.text.replace("httpequiv", "")
    for path, operations in GATEWAY.app.openapi()["paths"].items():
        for method in operations:
            assert f"<h2>{method.upper()} {path}</h2>" in page.text
    for name in examples.CHATS:
        assert name in page.text


def test_openapi_when_read_says_what_keys_routes_need():
    document = GATEWAY.call("GET", "/openapi.json").json()
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    responses = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(responses) == {"200", "4XX", "5XX"}


VALID = (
    ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3, "stop": ["a"]}),
    ("/v1/chat/completions", examples.CHATS["What a tool gave back"]),
    ("/v1/chat/completions", examples.CHATS["JSON that follows a schema"]),
    ("/v1/embeddings", {"model": "mini", "input": ["a", "b"], "dimensions": 2}),
    ("/v1/event-streams", examples.EVENT_STREAMS["A chat for a browser"]),
)
ODD = (
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "\x00",
    "x" * 5000,
    "\u2028é😀",
    [],
    {},
    [[]],
    [None],
    {"": {}},
    {"type": "function"},
    float("nan"),
    float("inf"),
)


def malformed_bodies(seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield bodies that are damaged as bytes, as JSON or as values; some stay valid."""
    rng = random.Random(seed)
    while True:
        path, valid = VALID[rng.randrange(len(VALID))]
        body = json.dumps(_changed(rng, valid)).encode()
        kind = rng.randrange(4)
        if kind == 0:  # Cut somewhere.
            body = body[: rng.randrange(len(body) + 1)]
        elif kind == 1:  # Some bytes replaced.
            damaged = bytearray(body)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            body = bytes(damaged)
        elif kind == 2:  # A piece repeated.
            at = rng.randrange(len(body))
            body = body[:at] + body[at : at + rng.randint(1, 9)] * rng.randint(2, 50) + body[at:]
        yield path, body


def _changed(rng: random.Random, value: Any) -> Any:
    """Return a value with something in it replaced, removed or added."""
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(value, dict):
        changed = {key: _changed(rng, item) for key, item in value.items() if rng.random() > 0.05}
        if rng.random() < 0.1:
            changed[rng.choice(("n", "seed", "logit_bias", "\ud800", "tools", "x"))] = rng.choice(
                ODD
            )
        return changed
    if isinstance(value, list):
        return [_changed(rng, item) for item in value]
    return value


def test_post_when_ten_thousand_bodies_are_malformed_never_fails():
    gateway = Gateway()
    bodies = malformed_bodies(7)
    statuses: dict[int, int] = {}

    async def scenario() -> None:
        for _ in range(NUM_MALFORMED):
            path, body = next(bodies)
            connection = await drive(
                gateway.app, Connection(body), path=path, headers=[AUTHORIZED, JSON]
            )
            said = connection.body
            assert connection.status < 500, (path, body, said)
            assert b"Traceback" not in said
            assert b'File "' not in said
            statuses[connection.status] = statuses.get(connection.status, 0) + 1
            if connection.status >= 400:
                assert len(said) < 2000
                assert json.loads(said)["error"]["message"]

    asyncio.run(scenario())
    assert set(statuses) <= {200, 201, 400, 404, 429}
    assert statuses[400] > NUM_MALFORMED / 2
