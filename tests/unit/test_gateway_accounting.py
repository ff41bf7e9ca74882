"""What requests reserve and what they are charged."""

import base64
import json
import struct
from http import HTTPStatus

import pytest
from gateway_fakes import ENCODER, MODEL, FakeBackend, Gateway

from serving.engines._protocol import FinishReason
from serving.gateway.accounts import Spent
from serving.gateway.reserving import most_embedding_tokens, most_generation_tokens
from serving.messages import (
    ChatPrompt,
    Delta,
    EmbeddingRequest,
    InferenceRequest,
    Refused,
    Sampling,
    ServedModel,
    Started,
    TextPrompt,
    TokenPrompt,
    Turn,
)

OVER = Refused(HTTPStatus.TOO_MANY_REQUESTS, "spent", "insufficient_quota", retry_after_s=60)
SMALL = ServedModel("tiny", "3", 0, context_tokens=100)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_answered_is_charged_what_it_used(stream):
    batches = [
        [Started(4), Delta(0, "a", (1,), cached_tokens=3), Delta(1, "b", (2,), cached_tokens=4)],
        [Delta(0, "", (), FinishReason.STOP), Delta(1, "c", (3,), FinishReason.STOP)],
    ]
    gateway = Gateway(FakeBackend(*batches))
    response = gateway.complete(n=2, stream=stream)
    reservation = gateway.accounts.only()
    assert reservation.num_choices == 2
    assert reservation.settled == [Spent("tiny", "3", 4, 3, 3)]
    if not stream:
        assert response.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_completion_when_the_budget_is_spent_is_refused_and_nothing_starts():
    gateway = Gateway()
    gateway.accounts.refusal = OVER
    assert gateway.complete(stream=True).status_code == 429
    refused = gateway.complete()
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "60"
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert gateway.backend.asked == []
    assert gateway.call("GET", "/v1/models").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_refused_by_the_model_is_charged_nothing(stream):
    refused = Refused(HTTPStatus.BAD_REQUEST, "too long", "context_length_exceeded")
    gateway = Gateway(FakeBackend([refused]))
    assert gateway.complete(stream=stream).status_code == 400
    assert gateway.accounts.only().settled == [None]


def test_most_tokens_when_nothing_bounds_the_answer_takes_what_is_given():
    request = InferenceRequest((TextPrompt("é" * 10),), Sampling())
    assert most_generation_tokens(MODEL, request, 50) == 20 + 16 + 50
    assert most_generation_tokens(SMALL, request, 50) == 36 + 100


def test_most_tokens_when_there_are_choices_counts_each_answer_and_each_prompt_once():
    prompts = (TokenPrompt((1, 2, 3)), TokenPrompt((4,) * 500))
    request = InferenceRequest(prompts, Sampling(max_tokens=7), num_choices=2)
    assert most_generation_tokens(MODEL, request, 50) == 503 + 4 * 7
    assert most_generation_tokens(SMALL, request, 50) == 103 + 4 * 7


def test_most_tokens_when_it_is_a_chat_counts_every_text_of_it():
    turns = (Turn("user", "abc"), Turn("tool", "4", name="read", tool_call_id="c12345"))
    request = InferenceRequest((ChatPrompt(turns, "tools"),), Sampling(max_tokens=1))
    assert most_generation_tokens(MODEL, request, 50) == 128 + 5 + 16 + 3 + 16 + 1 + 4 + 6 + 1
    embedding = EmbeddingRequest((TextPrompt("abc"), TokenPrompt((1, 2))))
    assert most_embedding_tokens(ENCODER, embedding) == 19 + 2


def calls(arguments: object) -> str:
    function = {"name": "f", "arguments": arguments}
    return json.dumps([{"id": "c1", "type": "function", "function": function}], ensure_ascii=False)


@pytest.mark.parametrize(
    "sent", ['{"a":[1e15,1e15,[1,2]]}', "[1e400]", '{ "\\u00e9" :  1}', "{oops"]
)
def test_most_tokens_when_a_call_is_sent_back_counts_it_as_templates_write_it(sent: str):
    written = sent if sent == "{oops" else json.loads(sent)
    assert most_with_call(sent) == 128 + 16 + len(calls(written).encode()) + 1


@pytest.mark.parametrize("sent", ["[" * 100_000, r'"\ud800"'])
def test_most_tokens_when_a_call_cannot_be_written_leaves_the_refusal_to_the_replica(sent: str):
    assert most_with_call(sent) > 128 + 16


def most_with_call(arguments: str) -> int:
    turns = (Turn("assistant", None, tool_calls=calls(arguments)),)
    request = InferenceRequest((ChatPrompt(turns),), Sampling(max_tokens=1))
    return most_generation_tokens(MODEL, request, 50)


def test_embeddings_when_asked_in_either_form_are_the_same_numbers():
    gateway = Gateway()
    body = {"model": "mini", "input": ["a", "b"]}
    plain = gateway.call("POST", "/v1/embeddings", json=body).json()
    coded = gateway.call("POST", "/v1/embeddings", json={**body, "encoding_format": "base64"})
    assert [item["embedding"] for item in plain["data"]] == [[0.6, 0.8]] * 2
    data = base64.b64decode(coded.json()["data"][1]["embedding"])
    assert struct.unpack("<2f", data) == pytest.approx((0.6, 0.8))
    assert plain["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert gateway.accounts.reservations[0].settled == [Spent("mini", "1", 3, 0)]


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", (TextPrompt("a"),)),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([[1], [2]], (TokenPrompt((1,)), TokenPrompt((2,)))),
    ],
)
def test_embeddings_when_input_has_any_form_are_understood(given, inputs):
    gateway = Gateway()
    body = {"model": "mini@1", "input": given, "dimensions": 1}
    answer = gateway.call("POST", "/v1/embeddings", json=body).json()
    assert answer["data"][0]["embedding"] == [0.6]
    (asked,) = gateway.backend.embedded
    assert (asked.inputs, asked.dimensions, asked.team) == (inputs, 1, "alice")


def test_embeddings_when_refused_have_the_status_and_cost_nothing():
    gateway = Gateway()
    gateway.backend.refusal = Refused(HTTPStatus.BAD_REQUEST, "too long", param="input")
    response = gateway.call("POST", "/v1/embeddings", json={"model": "mini", "input": "x"})
    assert response.status_code == 400
    assert gateway.accounts.only().settled == [None]


def test_model_when_asked_for_what_it_does_not_do_names_the_right_route():
    gateway = Gateway()
    refused = gateway.call("POST", "/v1/embeddings", json={"model": "tiny", "input": "x"})
    assert (refused.status_code, "/v1/chat" in refused.text) == (400, True)
    refused = gateway.complete(model="mini")
    assert (refused.status_code, "/v1/embeddings" in refused.text) == (400, True)
