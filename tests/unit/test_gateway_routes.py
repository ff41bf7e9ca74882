from http import HTTPStatus

import pytest
from gateway_fakes import KEY, MODEL, FakeBackend, Gateway, hello, stream_documents

from cluster.errors import StorageError
from serving.engines._protocol import FinishReason
from serving.gateway.accounts import Principal, Scope
from serving.messages import Delta, Refused, Started


@pytest.fixture
def gateway():
    return Gateway(FakeBackend(*hello()))


def test_models_when_asked_lists_what_is_served(gateway):
    encoder, model = gateway.call("GET", "/v1/models").json()["data"]
    assert (model["id"], model["root"], model["created"]) == ("tiny", "tiny@3", MODEL.published_s)
    assert (encoder["id"], encoder["task"]) == ("mini", "embed")


@pytest.mark.parametrize("name", ["tiny", "tiny@3"])
def test_model_when_named_either_way_is_found(gateway, name):
    assert gateway.call("GET", f"/v1/models/{name}").json()["id"] == "tiny"
    assert gateway.complete(model=name).status_code == 200


def test_completion_when_model_is_unknown_lists_those_there_are(gateway):
    response = gateway.complete(model="tiny@2")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "`tiny`" in response.json()["error"]["message"]


def test_completion_when_answered_has_text_and_counts(gateway):
    answer = gateway.complete().json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello", "finish_reason": "length", "logprobs": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_completion_when_token_ids_are_asked_for_has_them(gateway):
    assert gateway.complete(return_token_ids=True).json()["choices"][0]["token_ids"] == [5, 7]


def test_completion_when_logprobs_are_asked_for_aligns_them_with_the_text(gateway):
    logprobs = gateway.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hel", "lo"]
    assert logprobs["text_offset"] == [0, 3]
    assert logprobs["top_logprobs"] == [{"Hel": -0.1, "Hey": -2.5}, {"lo": -0.2, "p": -0.15}]


def test_chat_when_answered_has_a_message_and_counts(gateway):
    answer = gateway.chat(logprobs=True, top_logprobs=2).json()
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert choice["logprobs"]["content"][0]["bytes"] == [72, 101, 108]
    assert choice["logprobs"]["content"][0]["top_logprobs"][1]["token"] == "Hey"
    assert answer["usage"]["total_tokens"] == 6


def test_completion_when_there_are_several_choices_keeps_them_apart(tmp_path):
    batch = [
        Started(1),
        Delta(1, "b", (2,)),
        Delta(0, "a", (1,), FinishReason.STOP),
        Delta(1, "c", (3,), FinishReason.LENGTH),
    ]
    choices = Gateway(FakeBackend(batch)).complete(n=2).json()["choices"]
    assert [(c["index"], c["text"]) for c in choices] == [(0, "a"), (1, "bc")]


def test_stream_when_completion_is_asked_for_gives_its_pieces(gateway):
    documents = stream_documents(gateway.complete(stream=True))
    assert [d["choices"][0]["text"] for d in documents] == ["Hel", "lo"]
    assert [d["choices"][0]["finish_reason"] for d in documents] == [None, "length"]
    assert len({d["id"] for d in documents}) == 1


def test_stream_when_usage_is_asked_for_ends_with_it(gateway):
    response = gateway.complete(stream=True, stream_options={"include_usage": True})
    *chunks, last = stream_documents(response)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
    assert [chunk["usage"] for chunk in chunks] == [None, None]


def test_stream_when_chat_is_asked_for_begins_with_the_role(gateway):
    documents = stream_documents(gateway.chat(stream=True))
    deltas = [d["choices"][0]["delta"] for d in documents]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}]


def test_stream_when_logprobs_are_asked_for_counts_offsets_on(gateway):
    documents = stream_documents(gateway.complete(stream=True, logprobs=1))
    assert [d["choices"][0]["logprobs"]["text_offset"] for d in documents] == [[0], [3]]


REFUSED = Refused(HTTPStatus.BAD_REQUEST, "too long", "context_length_exceeded", "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_completion_when_refused_before_it_starts_has_the_status(tmp_path, stream):
    response = Gateway(FakeBackend([REFUSED])).complete(stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_stream_when_refused_on_the_way_says_so_and_ends(tmp_path):
    lost = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the replica failed")
    gateway = Gateway(FakeBackend([Started(1), Delta(0, "a", (1,))], [lost]))
    documents = stream_documents(gateway.complete(stream=True))
    assert documents[-1]["error"]["message"] == "the replica failed"


def test_completion_when_backend_has_a_bug_hides_the_reason(tmp_path):
    gateway = Gateway(FakeBackend([Delta(99, "secret", (1,))]))
    response = gateway.complete()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert 'raysmith_requests_total{route="/v1/completions",status="500"} 1.0' in (
        gateway.call("GET", "/metrics").text
    )


def test_readyz_when_a_team_may_ask_some_models_names_no_others(gateway):
    assert gateway.call("GET", "/readyz").json()["models"] == ["tiny@3", "mini@1"]
    mine = frozenset({"mini"})
    gateway.accounts.keys[KEY] = Principal("k1", "alice", frozenset({Scope.METRICS}), mine)
    assert gateway.call("GET", "/readyz").json() == {"status": "ready", "models": ["mini@1"]}


def test_readyz_when_a_replica_is_not_ready_is_503(gateway):
    gateway.backend.refusal = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "wait", retry_after_s=1)
    response = gateway.call("GET", "/readyz")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


def test_call_when_accounts_fail_is_503_without_the_reason(gateway):
    gateway.accounts.failure = StorageError("the disk of /secret is full")
    response = gateway.call("GET", "/v1/models")
    assert response.status_code == 503
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)]
)
def test_call_when_route_is_wrong_has_the_openai_shape(gateway, method, path, status):
    response = gateway.call(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers.get("Allow") == ("POST" if status == 405 else None)


def test_post_when_body_is_too_large_is_413(tmp_path):
    gateway = Gateway(FakeBackend(*hello()), max_body_bytes=100)
    response = gateway.complete(prompt="x" * 100)
    assert response.status_code == 413
    assert gateway.backend.asked == []


def test_metrics_when_requests_were_answered_counts_them(gateway):
    gateway.complete()
    gateway.complete(n=9)
    page = gateway.call("GET", "/metrics").text
    assert 'raysmith_requests_total{route="/v1/completions",status="200"} 1.0' in page
    assert 'raysmith_requests_total{route="/v1/completions",status="400"} 1.0' in page
    served = 'model="tiny",team="alice",version="3"'
    assert f'raysmith_tokens_total{{kind="prompt",{served}}} 4.0' in page
    assert f'raysmith_tokens_total{{kind="generated",{served}}} 2.0' in page
    assert f"raysmith_first_token_seconds_count{{{served}}} 1.0" in page
    assert f"raysmith_between_tokens_seconds_count{{{served}}} 1.0" in page
    refusals = 'raysmith_refusals_total{reason="Bad Request",status="400",team="alice"} 1.0'
    assert refusals in page
