"""Streams and their ends: places, deadlines, waiting, slow and leaving clients, lost replicas."""

import asyncio
import json
from http import HTTPStatus

import pytest
from asgi_driver import Connection, drive
from gateway_fakes import FakeBackend, Gateway, hello, stream_documents

from serving.engines._protocol import FinishReason
from serving.gateway.errors import RefusedError
from serving.gateway.limits import Admission
from serving.messages import Delta, Refused, Started

LOST = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the replica failed", "engine_failed")


def body_of(**fields):
    return json.dumps({"model": "tiny", "prompt": "x", **fields}).encode()


def test_completion_when_server_is_full_is_429_at_once_and_later_answered():
    gateway = Gateway(max_accepted_choices=3)

    async def scenario():
        gateway.backend.release = asyncio.Event()
        gateway.backend.batches = [[Started(1)]]
        first = asyncio.create_task(drive(gateway.app, Connection(body_of(n=2))))
        await gateway.backend.was_asked.wait()
        refused = await drive(gateway.app, Connection(body_of(n=2)))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        gateway.backend.batches = []
        gateway.backend.release.set()
        return refused, await drive(gateway.app, Connection(body_of(n=2)))

    refused, later = asyncio.run(scenario())
    assert [refused.status, later.status] == [429, 200]
    assert refused.headers[b"retry-after"] == b"1"
    assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"
    assert all(events.is_closed for events in gateway.backend.started)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/event-streams"])
def test_completion_when_server_is_full_is_refused_before_its_body_is_read(path: str):
    gateway = Gateway(max_accepted_choices=1)

    async def scenario():
        gateway.backend.release = asyncio.Event()
        gateway.backend.batches = [[Started(1)]]
        first = asyncio.create_task(drive(gateway.app, Connection(body_of())))
        await gateway.backend.was_asked.wait()
        refused = await drive(gateway.app, Connection(b"{", is_ended=False), path=path)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return refused

    refused = asyncio.run(scenario())
    assert refused.status == 429
    assert len(refused._messages) == 1


def test_completion_when_it_can_never_fit_is_400():
    response = Gateway(max_accepted_choices=3).complete(n=4)
    assert response.status_code == 400
    assert "at most 3" in response.json()["error"]["message"]


def test_admission_when_one_team_takes_all_it_can_leaves_a_quarter_to_others():
    admission = Admission(16)
    for _ in range(12):
        admission.enter("greedy")
    with pytest.raises(RefusedError):
        admission.enter("greedy")
    places = [admission.enter("small") for _ in range(4)]
    with pytest.raises(RefusedError):
        admission.enter("small")
    for place in places:
        place.leave()
        place.leave()
    assert admission.num_accepted == 12


def test_place_when_others_contend_keeps_what_it_holds():
    admission = Admission(4)
    places = [admission.enter("greedy") for _ in range(3)]
    admission.enter("small")
    with pytest.raises(RefusedError):
        admission.enter("greedy")
    places[0].grow(1)
    assert admission.num_accepted == 4


@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_client_leaves_closes_the_events_and_charges_what_was_made(stream):
    gateway = Gateway(FakeBackend(*hello()[:1]))

    async def scenario():
        gateway.backend.release = asyncio.Event()
        connection = Connection(body_of(stream=stream))
        call = asyncio.create_task(drive(gateway.app, connection))
        await gateway.backend.was_asked.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        connection.left.set()
        await call

    asyncio.run(scenario())
    assert gateway.backend.started[0].is_closed
    (spent,) = gateway.accounts.only().settled
    assert (spent.prompt_tokens, spent.generated_tokens) == (4, 1)
    assert "raysmith_accepted_choices 0.0" in gateway.call("GET", "/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_source_ends_early_is_never_silently_short(stream):
    gateway = Gateway(FakeBackend([Started(4), Delta(0, "Hel", (5,))]))
    response = gateway.complete(stream=stream)
    error = (stream_documents(response)[-1] if stream else response.json())["error"]
    assert error["code"] == "answer_incomplete"
    assert response.status_code == (200 if stream else 502)


def test_stream_when_lost_says_so_in_one_error_event_and_ends():
    batches = [[Started(1), Delta(0, "a", (1,))], [Delta(0, "b", (2,)), LOST]]
    text = Gateway(FakeBackend(*batches)).complete(stream=True).text
    *pieces, error, done, rest = text.split("\n\n")
    assert [json.loads(p.removeprefix("data: "))["choices"][0]["text"] for p in pieces] == [
        "a",
        "b",
    ]
    assert error.startswith("event: error\ndata: ")
    assert json.loads(error.splitlines()[1].removeprefix("data: "))["error"]["code"] == LOST.code
    assert (done, rest) == ("data: [DONE]", "")


@pytest.mark.parametrize("stream", [False, True])
def test_stream_when_backend_has_a_bug_on_the_way_says_only_that(stream):
    gateway = Gateway(FakeBackend([Started(1), Delta(0, "a", (1,))], [Delta(99, "secret", (1,))]))
    response = gateway.complete(stream=stream)
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "the server failed" in response.text
    assert gateway.accounts.only().settled[0].generated_tokens == 1


@pytest.mark.parametrize("how", ["header", "field", "both"])
@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_its_deadline_passes_is_504_or_an_error_event(how, stream):
    gateway = Gateway(FakeBackend([Started(4), Delta(0, "Hel", (5,))]))

    async def scenario():
        gateway.backend.release = asyncio.Event()
        fields = {} if how == "header" else {"timeout_s": 0.05 if how == "field" else 60.0}
        headers = {} if how == "field" else {"x-deadline-ms": "50"}
        async with gateway.client() as client:
            body = {"model": "tiny", "prompt": "x", "stream": stream, **fields}
            return await client.post("/v1/completions", json=body, headers=headers)

    response = asyncio.run(scenario())
    assert response.status_code == (200 if stream else 504)
    error = (stream_documents(response)[-1] if stream else response.json())["error"]
    assert error["code"] == "deadline_exceeded"
    assert gateway.backend.started[0].is_closed


def test_embedding_when_its_deadline_passes_is_504():
    gateway = Gateway()

    async def scenario():
        gateway.backend.release = asyncio.Event()
        async with gateway.client() as client:
            body = {"model": "mini", "input": "x", "timeout_s": 0.02}
            return await client.post("/v1/embeddings", json=body)

    assert asyncio.run(scenario()).status_code == 504
    assert gateway.accounts.only().settled == [None]


def test_stream_when_it_waits_in_a_queue_is_kept_alive_and_then_answered():
    gateway = Gateway(FakeBackend(*hello()), keep_alive_s=0.01)
    real = gateway.backend.generate

    async def scenario():
        go_on = asyncio.Event()

        class Waiting:
            def __init__(self, events):
                self._events = events

            def __aiter__(self):
                return self

            async def __anext__(self):
                await go_on.wait()
                return await anext(self._events)

            async def aclose(self):
                await self._events.aclose()

        gateway.backend.generate = lambda model, request: Waiting(real(model, request))
        connection = Connection(body_of(stream=True))
        call = asyncio.create_task(drive(gateway.app, connection))
        await connection.was_sent.wait()
        go_on.set()
        await call
        return connection

    connection = asyncio.run(scenario())
    assert connection.body.startswith(b": still here\n\n")
    assert connection.body.endswith(b"data: [DONE]\n\n")
    assert connection.body.count(b'"text":"Hel"') == 1


def test_stream_when_refused_after_waiting_ends_with_an_error_event():
    gateway = Gateway(FakeBackend([LOST]), keep_alive_s=0.01)
    real = gateway.backend.generate

    async def scenario():
        connection = Connection(body_of(stream=True))

        class Waiting:
            def __init__(self, events):
                self._events = events

            def __aiter__(self):
                return self

            async def __anext__(self):
                await connection.was_sent.wait()
                return await anext(self._events)

            async def aclose(self):
                await self._events.aclose()

        gateway.backend.generate = lambda model, request: Waiting(real(model, request))
        return await drive(gateway.app, connection)

    body = asyncio.run(scenario()).body
    assert body.index(b": still here") < body.index(b"event: error")
    assert gateway.accounts.only().settled == [None]


def test_stream_when_client_stops_reading_is_cancelled():
    gateway = Gateway(FakeBackend(*hello()[:1]), keep_alive_s=0.01, max_stall_s=0.02)

    async def scenario():
        gateway.backend.release = asyncio.Event()
        connection = Connection(body_of(stream=True))
        connection.may_send.clear()
        return await drive(gateway.app, connection)

    asyncio.run(scenario())
    assert gateway.backend.started[0].is_closed
    assert gateway.accounts.only().settled[0].generated_tokens == 1


@pytest.mark.parametrize("is_reading", [True, False])
def test_stream_when_the_server_stops_says_so_in_an_error_event(is_reading):
    gateway = Gateway(FakeBackend(*hello()[:1]))

    async def scenario():
        gateway.backend.release = asyncio.Event()
        connection = Connection(body_of(stream=True))
        call = asyncio.create_task(drive(gateway.app, connection))
        while len(connection.sent) < 2:  # noqa: ASYNC110 - no event for the second message
            await asyncio.sleep(0)
        if not is_reading:
            connection.may_send.clear()
        call.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await call
        return connection

    connection = asyncio.run(scenario())
    *_, error, done, _ = connection.body.split(b"\n\n")
    document = json.loads(error.removeprefix(b"event: error\ndata: "))
    assert document["error"]["code"] == "server_stopping"
    assert done == b"data: [DONE]"
    assert gateway.backend.started[0].is_closed
    assert gateway.accounts.only().settled[0].generated_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_the_server_stops_before_the_answer_sends_no_part_of_one(stream):
    gateway = Gateway(FakeBackend([]))

    async def scenario():
        gateway.backend.release = asyncio.Event()
        connection = Connection(body_of(stream=stream))
        call = asyncio.create_task(drive(gateway.app, connection))
        await gateway.backend.was_asked.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return connection.sent

    assert asyncio.run(scenario()) == []
    assert gateway.accounts.only().settled == [None]


def test_stream_when_the_reader_is_late_merges_what_came_in_between():
    batch = [
        Started(1),
        Delta(0, "a", (1,)),
        Delta(1, "x", (9,)),
        Delta(0, "b", (2,)),
        Delta(0, "", (3,), FinishReason.STOP),
        Delta(1, "", (8,), FinishReason.STOP),
    ]
    response = Gateway(FakeBackend(batch)).complete(stream=True, n=2, return_token_ids=True)
    choices = [document["choices"][0] for document in stream_documents(response)]
    assert [(c["index"], c["text"], c["token_ids"]) for c in choices] == [
        (0, "ab", [1, 2, 3]),
        (1, "x", [9, 8]),
    ]
    assert [c["finish_reason"] for c in choices] == ["stop", "stop"]


def test_stream_when_text_lags_behind_tokens_has_no_empty_frames():
    batches = [[Started(1), Delta(0, "", (1,))], [Delta(0, "é", (2,), FinishReason.STOP)]]
    for ask in (Gateway(FakeBackend(*batches)).complete, Gateway(FakeBackend(*batches)).chat):
        documents = stream_documents(ask(stream=True))
        texts = [str(document["choices"][0]) for document in documents]
        assert sum("é" in text for text in texts) == 1
        assert len(texts) <= 2
