"""Replicas without engines behind real sockets, for tests of what lies between gateway and them."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

from serving.directory import LocalDirectory
from serving.engines._protocol import EngineStats, FinishReason
from serving.fleet import Fleet, Waits
from serving.messages import (
    Delta,
    Embedded,
    EmbeddingRequest,
    Event,
    InferenceRequest,
    Refused,
    Sampling,
    ServedModel,
    Started,
    TokenPrompt,
)
from serving.replica_host import ReplicaHost
from serving.routing import Route, RoutingTable

MODEL = ServedModel("tiny", "1", 1_700_000_000)
SHORT = Waits(connect_s=2.0, replacement_s=2.0, cold_start_s=2.0)


def request(max_tokens: int = 8, num_choices: int = 1, **fields) -> InferenceRequest:
    prompts = (TokenPrompt((1, 2, 3)),)
    return InferenceRequest(prompts, Sampling(max_tokens=max_tokens), num_choices, **fields)


class CountingReplica:
    """Answers token i of choice c with 100 * c + i, going on after what was delivered.

    It waits before each token in `pause_at`, until `go_on` is set.
    """

    def __init__(self, pause_at: set[int] = frozenset(), refusal: Refused | None = None) -> None:
        self.pause_at, self.refusal = pause_at, refusal
        self.asked: list[InferenceRequest] = []
        self.num_cancelled = 0
        self.is_paused = asyncio.Event()
        self.go_on = asyncio.Event()
        self.is_closed = False

    async def generate(self, asked: InferenceRequest) -> AsyncGenerator[list[Event], None]:
        self.asked.append(asked)
        if self.refusal is not None:
            yield [self.refusal]
            return
        try:
            yield [Started(3)]
            done = asked.resumed or ((),) * asked.total_choices
            for at in range(min(map(len, done)), asked.sampling.max_tokens):
                if at in self.pause_at:
                    self.is_paused.set()
                    await self.go_on.wait()
                yield [
                    self._delta(choice, at, asked)
                    for choice in range(asked.total_choices)
                    if choice not in asked.finished and at >= len(done[choice])
                ]
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise

    async def embed(self, asked: EmbeddingRequest) -> Embedded | Refused:
        if self.pause_at:
            self.is_paused.set()
            await self.go_on.wait()
        return Embedded(((1.0,),) * len(asked.inputs), 3)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 1, 0, 0, 0)

    def close(self) -> None:
        self.is_closed = True

    def _delta(self, choice: int, at: int, asked: InferenceRequest) -> Delta:
        # Later choices end earlier, so that some have ended when a replica is lost.
        last = asked.sampling.max_tokens - 1 - choice
        reason = FinishReason.LENGTH if at == last else None
        token_ids = (100 * choice + at,) if at <= last else ()
        return Delta(choice, str(at) if token_ids else "", token_ids, reason)


class Setting:
    """A fleet and the replicas that were started for it."""

    def __init__(self, waits: Waits) -> None:
        self.directory = LocalDirectory()
        self.woken: list[Route] = []
        self.on_wake: Callable[[], object] = lambda: None
        self.fleet = Fleet(self.directory, "node", self._wake, waits)
        self.hosts: list[ReplicaHost] = []

    async def _wake(self, route: Route) -> None:
        self.woken.append(route)
        result = self.on_wake()
        if asyncio.iscoroutine(result):
            await result

    async def add(self, replica: CountingReplica, model: ServedModel = MODEL) -> ReplicaHost:
        host = ReplicaHost(replica, model, self.directory)
        await host.start("127.0.0.1", "node")
        self.hosts.append(host)
        return host

    async def ready(self, num_replicas: int) -> None:
        """Return once so many replicas are connected."""
        async with asyncio.timeout(5):
            while self.fleet.num_connected < num_replicas:  # noqa: ASYNC110 - no event to wait for
                await asyncio.sleep(0.005)


@asynccontextmanager
async def setting(*replicas: CountingReplica, waits: Waits = SHORT, **route):
    made = Setting(waits)
    made.fleet.set_table(RoutingTable(routes=(Route(name="tiny", version="1", **route),)))
    made.fleet.start()
    try:
        for replica in replicas:
            await made.add(replica)
        await made.ready(len(replicas))
        yield made
    finally:
        for host in made.hosts:
            with suppress(Exception):
                await host.stop(0)
        await made.fleet.close()


async def collect(events) -> list[Event]:
    return [event for batch in [b async for b in events] for event in batch]


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    deltas = [e for e in events if isinstance(e, Delta) and e.choice == choice]
    return [token for delta in deltas for token in delta.token_ids]
