"""Clients that people use, over a real connection: the documentation's examples, openai, curl."""

import asyncio
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import openai
import pytest
from gateway_fakes import KEY, FakeBackend, hello
from live_gateway import Live, serve

from serving.engines._protocol import FinishReason
from serving.messages import Delta, Refused, Started

PAGE = Path(__file__).parents[2] / "docs" / "http-api.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
LOST = Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the replica failed", "engine_failed")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve() as running:
        yield running


def client_of(live: Live, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, **options)


def blocks() -> list[object]:
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    return [pytest.param(*block, id=f"{at}-{block[0]}") for at, block in enumerate(found)]


def run(live: Live, kind: str, body: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", body]
    if kind == "python":
        command = [sys.executable, "-c", body]
    result = subprocess.run(
        command, env=live.environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("kind", "body"), blocks())
def test_every_block_of_the_page_when_run_ends_well(live: Live, kind: str, body: str):
    if kind == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    output = run(live, kind, body)
    assert output.strip()
    assert '"error"' not in output


def test_page_when_it_asks_in_a_stream_gets_it_whole(live: Live):
    streamed = next(body for kind, body in BLOCK.findall(PAGE.read_text()) if "--no-buffer" in body)
    output = run(live, "bash", streamed)
    assert output.endswith("data: [DONE]\n\n")
    assert '"completion_tokens":2' in output


def test_openai_client_when_it_asks_every_way_is_answered(live: Live):
    client = client_of(live)
    assert [model.id for model in client.models.list()] == ["mini", "tiny"]
    assert client.models.retrieve("tiny").root == "tiny@3"
    completion = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, logit_bias={"5": 1}
    )
    assert [choice.text for choice in completion.choices] == ["Hello"] * 4
    messages = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="tiny", messages=messages)
    with client.chat.completions.create(model="tiny", messages=messages, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert whole.choices[0].message.content == streamed == "Hello"
    assert whole.usage.prompt_tokens_details.cached_tokens == 0


def test_openai_client_when_it_embeds_reads_the_same_vector_either_way(live: Live):
    client = client_of(live)
    coded = client.embeddings.create(model="mini", input="a").data[0].embedding
    plain = client.embeddings.create(model="mini", input="a", encoding_format="float")
    assert coded == pytest.approx(plain.data[0].embedding)


def test_openai_client_when_the_model_calls_a_tool_reads_the_call():
    batch = [Started(1), Delta(0, CALL, (1,), FinishReason.STOP)]
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    options = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "tools": [tool]}
    with serve(FakeBackend(batch)) as live:
        client = client_of(live)
        (call,) = client.chat.completions.create(**options).choices[0].message.tool_calls
        chunks = list(client.chat.completions.create(**options, stream=True))
    (streamed,) = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert call.function.arguments == streamed.function.arguments == '{"city": "Oslo"}'
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_openai_client_when_refused_raises_the_right_class(live: Live):
    client = client_of(live)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="large", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=3)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="rs-wrong").models.list()


def test_openai_client_when_a_stream_breaks_raises_what_it_said():
    with serve(FakeBackend([Started(1), Delta(0, "a", (1,))], [LOST])) as live:
        stream = client_of(live).completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the replica failed"):
            list(stream)


def test_openai_client_when_it_leaves_a_stream_ends_the_work():
    backend = FakeBackend(*hello()[:1])
    backend.release = asyncio.Event()  # Never set: the stream has no end of its own.
    with serve(backend) as live:
        stream = client_of(live).completions.create(model="tiny", prompt="x", stream=True)
        assert next(iter(stream)).choices[0].text == "Hel"
        stream.close()
        deadline_s = time.monotonic() + 5
        while not backend.started[0].is_closed:
            assert time.monotonic() < deadline_s, "the work goes on without its client"
            time.sleep(0.01)
    assert live.gateway.accounts.only().settled[0].generated_tokens == 1


def exchange(live: Live, request: bytes) -> bytes:
    """Return everything the server says to raw bytes until it closes or is silent."""
    port = int(live.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except TimeoutError:
            pass
        return said


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n{}{}{}",
    ],
)
def test_raw_request_when_smuggled_is_refused_and_the_connection_ends(live: Live, headers: bytes):
    kind = b"Content-Type: application/json\r\n"
    said = exchange(live, HEAD + kind + headers)
    assert said.count(b"HTTP/1.1") == 1
    assert said.startswith(b"HTTP/1.1 400")


def test_raw_request_when_its_body_is_slow_is_408_and_the_connection_ends():
    with serve(body_timeout_s=0.1) as live:
        started_s = time.monotonic()
        kind = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        said = exchange(live, HEAD + kind)
        assert time.monotonic() - started_s < 4
    assert said.startswith(b"HTTP/1.1 408")
