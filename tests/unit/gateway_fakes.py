"""A backend without engines, and a client without a network, for tests of the gateway."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from serving.engines._protocol import Alternative, FinishReason, TokenLogprob
from serving.gateway.app import GatewayLimits, create_app
from serving.gateway.auth import KeyRing, make_key
from serving.messages import Delta, Event, InferenceRequest, Refused, ServedModel, Started

MODEL = ServedModel("tiny", "3", 1_700_000_000)


class FakeEvents:
    """Gives batches, then waits for `release` if there is one."""

    def __init__(self, batches: list[list[Event]], release: asyncio.Event | None) -> None:
        self._batches = list(batches)
        self._release = release
        self.is_closed = False

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return self

    async def __anext__(self) -> list[Event]:
        if self._batches:
            return self._batches.pop(0)
        if self._release is not None:
            await self._release.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.is_closed = True


class FakeBackend:
    """Answers every request with the same batches and remembers what was asked."""

    def __init__(self, *batches: list[Event]) -> None:
        self.batches = list(batches)
        self.asked: list[InferenceRequest] = []
        self.started: list[FakeEvents] = []
        self.release: asyncio.Event | None = None
        self.was_asked = asyncio.Event()
        self.refusal: Refused | None = None

    def models(self) -> list[ServedModel]:
        return [MODEL]

    def generate(self, model: ServedModel, request: InferenceRequest) -> FakeEvents:
        assert model == MODEL
        self.asked.append(request)
        self.was_asked.set()
        self.started.append(FakeEvents(self.batches, self.release))
        return self.started[-1]

    async def problem(self) -> Refused | None:
        return self.refusal


def hello() -> list[list[Event]]:
    """Return two tokens, the first with its likelihood."""
    top = (Alternative(5, "Hel", -0.1), Alternative(6, "Hey", -2.5))
    first = TokenLogprob(5, "Hel", -0.1, top)
    second = TokenLogprob(7, "lo", -0.2, (Alternative(8, "p", -0.15),))
    return [
        [Started(4), Delta(0, "Hel", (5,), None, (first,))],
        [Delta(0, "lo", (7,), FinishReason.LENGTH, (second,))],
    ]


class Gateway:
    """A gateway over a fake backend, with one key, called in process."""

    def __init__(self, tmp_path: Path, backend: FakeBackend, **limits: int) -> None:
        keys_path = tmp_path / "api-keys"
        self.key = make_key(keys_path, "alice")
        self.keys_path = keys_path
        self.backend = backend
        self.app = create_app(backend, KeyRing(keys_path), GatewayLimits(**limits))

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": "def read_", **fields}
        return self.call("POST", "/v1/completions", json=body)

    def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "tiny", "messages": messages, **fields}
        return self.call("POST", "/v1/chat/completions", json=body)


def stream_documents(response: httpx.Response) -> list[Any]:
    """Return what a stream said, without its end mark, which must be there."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
