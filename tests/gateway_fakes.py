"""A backend without engines, and a client without a network, for tests of the gateway."""

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import httpx

from cluster.errors import RaysmithError, StorageError
from serving.engines._protocol import Alternative, FinishReason, TokenLogprob
from serving.gateway.accounts import Principal, Scope, Spent
from serving.gateway.app import create_app
from serving.gateway.errors import RefusedError
from serving.gateway.limits import GatewayLimits
from serving.messages import (
    Delta,
    Embedded,
    EmbeddingRequest,
    Event,
    InferenceRequest,
    Refused,
    ReplicaStats,
    ServedModel,
    Started,
)

MODEL = ServedModel("tiny", "3", 1_700_000_000)
ENCODER = ServedModel("mini", "1", 1_700_000_000, "embed")
KEY = "rs-alice"


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
        self.embedded: list[EmbeddingRequest] = []
        self.started: list[FakeEvents] = []
        self.release: asyncio.Event | None = None
        self.was_asked = asyncio.Event()
        self.refusal: Refused | None = None
        self.replicas: list[ReplicaStats] = []

    def models(self) -> list[ServedModel]:
        return [MODEL, ENCODER]

    def choose(self, asked: str) -> ServedModel | None:
        named = (model for model in self.models() if asked in (model.name, model.reference))
        return next(named, None)

    async def embed(self, model: ServedModel, request: EmbeddingRequest) -> Embedded | Refused:
        assert model == ENCODER
        self.embedded.append(request)
        self.was_asked.set()
        if self.release is not None:
            await self.release.wait()
        vector = (0.6, 0.8)[: request.dimensions or 2]
        return self.refusal or Embedded((vector,) * len(request.inputs), 3)

    def stats(self) -> list[ReplicaStats]:
        return self.replicas

    def generate(self, model: ServedModel, request: InferenceRequest) -> FakeEvents:
        assert model == MODEL
        self.asked.append(request)
        self.was_asked.set()
        batches = self.batches or answers_for(request)
        self.started.append(FakeEvents(batches, self.release))
        return self.started[-1]

    async def problem(self) -> Refused | None:
        return self.refusal


def answers_for(request: InferenceRequest) -> list[list[Event]]:
    """Return an answer for each choice, however many there are."""
    choices = range(request.total_choices)
    first = [Delta(choice, "Hel", (5,)) for choice in choices]
    rest = [Delta(choice, "lo", (7,), FinishReason.LENGTH) for choice in choices]
    return [[Started(4), *first], [*rest]]


class FakeReservation:
    """Remembers what was charged."""

    def __init__(self, num_tokens: int, num_choices: int) -> None:
        self.num_tokens, self.num_choices = num_tokens, num_choices
        self.settled: list[Spent | None] = []

    def settle(self, spent: Spent | None) -> None:
        self.settled.append(spent)


class FakeAccounts:
    """Keys in a dictionary; `refusal` is raised by reservations, `failure` by everything."""

    def __init__(self) -> None:
        every = frozenset(Scope)
        self.keys = {KEY: Principal("k1", "alice", every)}
        self.reservations: list[FakeReservation] = []
        self.refusal: Refused | None = None
        self.failure: RaysmithError | None = None

    async def authenticate(self, secret: str) -> Principal:
        if self.failure is not None:
            raise self.failure
        if secret not in self.keys:
            raise RefusedError(Refused(HTTPStatus.UNAUTHORIZED, f"{secret} was revoked on Monday"))
        return self.keys[secret]

    async def reserve(
        self, principal: Principal, num_tokens: int, num_choices: int
    ) -> FakeReservation:
        del principal
        if self.refusal is not None:
            raise RefusedError(self.refusal)
        self.reservations.append(FakeReservation(num_tokens, num_choices))
        return self.reservations[-1]

    async def usage(self, team: str) -> dict[str, object]:
        if team == "nobody":
            raise RefusedError(Refused(HTTPStatus.NOT_FOUND, "there is no team `nobody`."))
        if team == "broken":
            raise StorageError("the disk of /secret is full")
        return {"team": team, "used_tokens": 6}

    def only(self) -> FakeReservation:
        """Return the one reservation there was, settled once."""
        (reservation,) = self.reservations
        assert len(reservation.settled) == 1
        return reservation


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
    """A gateway over fakes, with one key for everything, called in process."""

    def __init__(self, backend: FakeBackend | None = None, **limits: Any) -> None:
        self.backend = backend or FakeBackend()
        self.accounts = FakeAccounts()
        self.app = create_app(self.backend, self.accounts, GatewayLimits(**limits))

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {KEY}"}
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
    blocks = [block for block in response.text.split("\n\n") if block]
    lines = [block.removeprefix("event: error\n").removeprefix("data: ") for block in blocks]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
