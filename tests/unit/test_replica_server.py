"""When a replica's tokens leave, and how one request fails beside others."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from serving.engines._protocol import FinishReason
from serving.messages import (
    Delta,
    Embedded,
    EmbeddingRequest,
    Event,
    InferenceRequest,
    Refused,
    Sampling,
    Started,
    TokenPrompt,
)
from serving.replica_server import ReplicaServer
from serving.transport import ReplicaConnection

SECRET = b"s" * 32
REQUEST = InferenceRequest((TokenPrompt((1,)),), Sampling(max_tokens=3))


class ThreePasses:
    """Answers three tokens, the second and third when their pass is let go."""

    def __init__(self) -> None:
        self.passes = [asyncio.Event(), asyncio.Event()]

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[list[Event], None]:
        del request
        yield [Started(1), Delta(0, "a", (1,))]
        await self.passes[0].wait()
        yield [Delta(0, "b", (2,))]
        await self.passes[1].wait()
        yield [Delta(0, "c", (3,), FinishReason.LENGTH)]

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        return Embedded(((1.0,),) * len(request.inputs), 1)


class Panic(BaseException):
    """What a library in Rust raises for a bug of its own; it is no Exception."""


class FailingAtSome(ThreePasses):
    """Fails at requests of the team `unlucky`, in a way that nobody foresaw."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[list[Event], None]:
        async for batch in super().generate(request):
            yield batch
            if request.team == "unlucky":
                raise self.error

    async def embed(self, request: EmbeddingRequest) -> Embedded:
        raise self.error


@asynccontextmanager
async def connected(answering: ThreePasses, folder: Path, wait_s: float):
    server, connection = ReplicaServer(answering, SECRET, wait_s), ReplicaConnection(SECRET)
    await connection.open(await server.start(folder / "s", "127.0.0.1", "node"), "node")
    try:
        yield connection
    finally:
        connection.close()
        await server.close()


async def batches_of_second_stream(folder: Path, num_streams: int, wait_s: float) -> list[str]:
    """Return the texts that came together on one of so many streams."""
    answering = ThreePasses()
    async with connected(answering, folder, wait_s) as connection:
        streams = [connection.generate(REQUEST) for _ in range(num_streams)]
        for stream in streams:
            await anext(stream)
        reading = [asyncio.create_task(anext(stream)) for stream in streams]
        for event in answering.passes:
            event.set()
            for _ in range(100):  # Turns of the event loop, for what is sent at once to arrive.
                await asyncio.sleep(0)
        found = [await task for task in reading]
        rest = [[batch async for batch in stream] for stream in streams]
    texts = [found[1], *rest[1]]
    return ["".join(event.text for event in batch) for batch in texts if batch]


@pytest.mark.parametrize(("num_streams", "expected"), [(2, ["b", "c"]), (8, ["bc"])])
def test_tokens_when_streams_are_many_leave_together(tmp_path, num_streams, expected):
    found = asyncio.run(batches_of_second_stream(tmp_path, num_streams, wait_s=60.0))
    assert found == expected


def test_tokens_when_streams_are_many_wait_no_longer_than_allowed(tmp_path):
    assert asyncio.run(batches_of_second_stream(tmp_path, 8, wait_s=0.0)) == ["b", "c"]


ERRORS = [RecursionError("too deep"), Panic("index out of bounds")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_generate_when_a_request_fails_unforeseen_ends_it_and_no_other(tmp_path, error):
    async def work():
        answering = FailingAtSome(error)
        async with connected(answering, tmp_path, 0.0) as connection:
            beside = connection.generate(REQUEST)
            await anext(beside)
            asked = InferenceRequest(REQUEST.prompts, REQUEST.sampling, team="unlucky")
            failed = [event async for batch in connection.generate(asked) for event in batch]
            for passed in answering.passes:
                passed.set()
            return failed, [event async for batch in beside for event in batch]

    failed, beside = asyncio.run(asyncio.wait_for(work(), 10))
    assert failed[:-1] == [Started(1), Delta(0, "a", (1,))]
    assert isinstance(failed[-1], Refused)
    assert (failed[-1].status, failed[-1].code) == (500, "generation_failed")
    assert [event.text for event in beside] == ["b", "c"]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_embed_when_a_request_fails_unforeseen_is_refused_and_the_connection_stays(tmp_path, error):
    async def work():
        async with connected(FailingAtSome(error), tmp_path, 0.0) as connection:
            refused = await connection.embed(EmbeddingRequest((TokenPrompt((1,)),)))
            return refused, connection.is_open

    refused, is_open = asyncio.run(asyncio.wait_for(work(), 10))
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code, is_open) == (500, "generation_failed", True)
