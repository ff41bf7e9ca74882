"""One-time addresses for a browser's EventSource."""

import asyncio
from http import HTTPStatus

import pytest
from asgi_driver import Connection, drive
from gateway_fakes import KEY, MODEL, Gateway, stream_documents

from serving.gateway.accounts import Principal, Scope
from serving.gateway.answering import Question
from serving.gateway.call import Call
from serving.gateway.errors import RefusedError
from serving.gateway.limits import GatewayLimits
from serving.gateway.rendering_completion import CompletionRendering
from serving.gateway.tickets import Tickets
from serving.messages import InferenceRequest, Refused, Sampling, Started, TextPrompt

CHAT = {
    "endpoint": "/v1/chat/completions",
    "body": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
}
QUESTION = Question(MODEL, InferenceRequest((TextPrompt("x"),), Sampling()), CompletionRendering())


def url_of(gateway: Gateway, body: object = CHAT) -> str:
    response = gateway.call("POST", "/v1/event-streams", json=body)
    assert response.status_code == 201, response.text
    assert response.json()["expires_in_s"] == 30
    return response.json()["url"]


def read(gateway: Gateway, url: str, **headers: str):
    return gateway.call("GET", url, headers={"Authorization": "", **headers})


def test_event_stream_when_read_without_a_key_gives_the_answer_once():
    gateway = Gateway()
    url = url_of(gateway)
    assert gateway.backend.asked == []
    response = read(gateway, url)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["access-control-allow-origin"] == "*"
    contents = [d["choices"][0]["delta"].get("content") for d in stream_documents(response)]
    assert contents == ["", "Hel", "lo"]
    assert gateway.accounts.only().settled[0].generated_tokens == 2
    assert gateway.backend.asked[0].team == "alice"
    again = read(gateway, url)
    assert (again.status_code, again.json()["error"]["code"]) == (401, "invalid_ticket")
    assert "POST /v1/event-streams" in again.json()["error"]["message"]


def test_event_stream_when_it_is_a_completion_has_its_shape():
    body = {"endpoint": "/v1/completions", "body": {"model": "tiny", "prompt": "x"}}
    gateway = Gateway()
    documents = stream_documents(read(gateway, url_of(gateway, body)))
    assert [d["choices"][0]["text"] for d in documents] == ["Hel", "lo"]


def test_event_stream_when_resumed_is_refused_and_the_ticket_stays():
    gateway = Gateway()
    url = url_of(gateway)
    refused = read(gateway, url, **{"Last-Event-ID": "3"})
    assert refused.status_code == 400
    assert "not replayed" in refused.json()["error"]["message"]
    assert read(gateway, url).status_code == 200


BUSY = Refused(HTTPStatus.TOO_MANY_REQUESTS, "later", "rate_limit_exceeded", retry_after_s=1)
SPENT = Refused(HTTPStatus.TOO_MANY_REQUESTS, "no more", "insufficient_quota")


@pytest.mark.parametrize(("refusal", "status"), [(BUSY, 200), (SPENT, 401)])
def test_event_stream_when_refused_can_be_read_again_only_where_that_may_help(refusal, status):
    gateway = Gateway()
    url = url_of(gateway)
    gateway.accounts.refusal = refusal
    assert read(gateway, url).status_code == 429
    gateway.accounts.refusal = None
    assert read(gateway, url).status_code == status
    assert read(gateway, url).status_code == 401


def test_event_stream_when_the_server_is_full_can_be_read_later():
    gateway = Gateway(max_accepted_choices=1)
    url = url_of(gateway)

    async def scenario() -> list[int]:
        gateway.backend.release = asyncio.Event()
        gateway.backend.batches = [[Started(1)]]
        body = b'{"model": "tiny", "prompt": "x"}'
        first = asyncio.create_task(drive(gateway.app, Connection(body)))
        await gateway.backend.was_asked.wait()
        refused = await drive(gateway.app, Connection(), method="GET", path=url, headers=[])
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        gateway.backend.batches = []
        gateway.backend.release.set()
        answered = await drive(gateway.app, Connection(), method="GET", path=url, headers=[])
        return [refused.status, answered.status]

    assert asyncio.run(scenario()) == [429, 200]


def test_event_stream_when_the_key_was_revoked_meanwhile_is_401():
    gateway = Gateway()
    url = url_of(gateway)
    del gateway.accounts.keys[KEY]
    assert read(gateway, url).status_code == 401


def test_event_stream_when_the_key_lost_its_scope_or_model_meanwhile_is_refused():
    gateway = Gateway()
    first, second = url_of(gateway), url_of(gateway)
    metrics = frozenset({Scope.METRICS})
    gateway.accounts.keys[KEY] = Principal("k1", "alice", metrics)
    assert read(gateway, first).status_code == 403
    every = frozenset({Scope.INFERENCE})
    gateway.accounts.keys[KEY] = Principal("k1", "alice", every, frozenset({"mini"}))
    assert read(gateway, second).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"endpoint": "/v1/embeddings", "body": {}}, "endpoint"),
        ({"endpoint": "/v1/completions", "body": {"model": "tiny"}}, "prompt"),
        ({"body": {}}, None),
    ],
)
def test_event_stream_when_its_request_is_wrong_is_400_at_once(body: object, param: str | None):
    response = Gateway().call("POST", "/v1/event-streams", json=body)
    assert response.status_code == 400
    if param == "prompt":
        assert response.json()["error"]["param"] == param


def test_event_stream_when_a_deadline_was_asked_for_keeps_to_it():
    gateway = Gateway()
    headers = {"x-deadline-ms": "50"}
    made = gateway.call("POST", "/v1/event-streams", json=CHAT, headers=headers)
    gateway.backend.batches = [[Started(1)]]
    gateway.backend.release = asyncio.Event()
    last = stream_documents(read(gateway, made.json()["url"]))[-1]
    assert last["error"]["code"] == "deadline_exceeded"


def test_ticket_when_it_is_old_is_unknown():
    now = 0.0
    tickets = Tickets(GatewayLimits(ticket_lifetime_s=30), lambda: now)
    first = tickets.issue(QUESTION, Call())
    now = 29.0
    second = tickets.issue(QUESTION, Call())
    now = 31.0
    assert tickets.redeem(first) is None
    assert tickets.redeem(second) is not None
    assert tickets.redeem(second) is None


def test_ticket_when_put_back_ends_when_it_was_to():
    now = 0.0
    tickets = Tickets(GatewayLimits(ticket_lifetime_s=30), lambda: now)
    first = tickets.issue(QUESTION, Call())
    now = 10.0
    second = tickets.issue(QUESTION, Call())
    held = tickets.redeem(first)
    assert held is not None
    tickets.put_back(first, held)
    now = 31.0
    assert tickets.redeem(first) is None
    assert tickets.redeem(second) is not None


def test_ticket_when_a_team_has_its_share_is_refused_and_others_are_not():
    tickets = Tickets(GatewayLimits(max_tickets=8))
    for _ in range(2):
        tickets.issue(QUESTION, call_by("bob"))
    with pytest.raises(RefusedError, match=r"^2 event streams of your team wait.*at most 2 may"):
        tickets.issue(QUESTION, call_by("bob"))
    tickets.issue(QUESTION, call_by("alice"))


def test_ticket_when_a_team_has_its_share_of_bytes_is_refused_and_others_are_not():
    tickets = Tickets(GatewayLimits(max_ticket_bytes=400))
    tickets.issue(QUESTION, call_by("bob", body_bytes=60))
    with pytest.raises(RefusedError, match=r"of your team.* hold 60 bytes.* has 41, at most 100 "):
        tickets.issue(QUESTION, call_by("bob", body_bytes=41))
    tickets.issue(QUESTION, call_by("bob", body_bytes=40))
    tickets.issue(QUESTION, call_by("alice", body_bytes=100))


def test_ticket_when_all_teams_have_as_many_as_may_be_is_refused():
    tickets = Tickets(GatewayLimits(max_tickets=8))
    for number in range(8):
        first = tickets.issue(QUESTION, call_by(f"team-{number // 2}"))
    with pytest.raises(RefusedError, match=r"^8 event streams of all teams wait.*at most 8 may"):
        tickets.issue(QUESTION, call_by("another"))
    tickets.redeem(first)
    tickets.issue(QUESTION, call_by("another"))


def test_ticket_when_all_teams_have_as_many_bytes_as_may_be_is_refused():
    tickets = Tickets(GatewayLimits(max_ticket_bytes=400))
    for number in range(4):
        tickets.issue(QUESTION, call_by(f"team-{number}", body_bytes=99))
    with pytest.raises(RefusedError, match=r"of all teams.* hold 396 bytes.* has 5, at most 400 "):
        tickets.issue(QUESTION, call_by("another", body_bytes=5))


def call_by(team: str, body_bytes: int = 0) -> Call:
    return Call(principal=Principal("k", team, frozenset()), body_bytes=body_bytes)
