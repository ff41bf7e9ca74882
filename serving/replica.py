"""A replica: one process that owns one engine and answers for it.

Takes requests from the gateway; gives batches of events. It does not know HTTP, keys or the
registry: the directory that it is given holds exactly one version of one model.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Any

import serving.engines
from cluster.errors import ContextLengthError, EngineError, RequestError
from jobs.data.tokenizer import load_tokenizer
from jobs.plugins import load_plugin
from serving.engines._protocol import Chunk, Engine, EngineInfo, GenerateRequest
from serving.messages import Delta, Event, InferenceRequest, Refused, Sampling, Started
from serving.prompts import PromptEncoder

_logger = logging.getLogger(__name__)


class EngineReplica:
    """Runs one engine; a Ray Serve deployment wraps it, a test calls it as it is."""

    def __init__(self, directory: str, engine: str, options: Mapping[str, Any]) -> None:
        """Load the model, every digest checked, and start the engine."""
        plugin = load_plugin(serving.engines, engine, what="engine")
        self._prompts = PromptEncoder(load_tokenizer(Path(directory)))
        self._engine: Engine = plugin.create(Path(directory), options)
        _logger.info("serving %s: %s", directory, self._engine.info())

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[list[Event], None]:
        """Yield what happens, several events at a time if the reader is slow; closing cancels."""
        try:
            prompts = await asyncio.to_thread(self._encode, request)
            streams = [
                self._engine.generate(_generate_request(prompt, request.sampling, index))
                for prompt in prompts
                for index in range(request.num_choices)
            ]
            started: list[Event] = [Started(sum(map(len, prompts)))]
            async with aclosing(merge(streams)) as batches:
                async for batch in batches:
                    yield [*started, *(_delta(choice, chunk) for choice, chunk in batch)]
                    started = []
        except ContextLengthError as error:
            yield [_refused(error.message, code="context_length_exceeded")]
        except RequestError as error:
            yield [_refused(error.message)]
        except EngineError as error:
            _logger.exception("a request failed")
            yield [Refused(HTTPStatus.SERVICE_UNAVAILABLE, error.message, code="engine_failed")]

    async def info(self) -> EngineInfo:
        """Return what runs here; raises EngineError if the engine stopped."""
        self.check_health()
        return self._engine.info()

    def check_health(self) -> None:
        """Raise EngineError if the engine stopped; Ray Serve then starts another replica."""
        self._engine.stats()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _encode(self, request: InferenceRequest) -> list[tuple[int, ...]]:
        return [self._prompts.encode(prompt) for prompt in request.prompts]


async def merge(
    streams: Sequence[AsyncIterator[Chunk]],
) -> AsyncGenerator[list[tuple[int, Chunk]], None]:
    """Yield chunks of all streams as they come, with their stream's number; closing closes all.

    The first exception of any stream ends all of them and is raised.
    """
    arrived: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Chunk]) -> None:
        try:
            async for chunk in stream:
                arrived.put_nowait((index, chunk))
            arrived.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
            arrived.put_nowait(error)

    pumps = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            failure = next((item for item in items if isinstance(item, Exception)), None)
            if failure is not None:
                raise failure
            num_open -= items.count(None)
            batch = [item for item in items if isinstance(item, tuple)]
            if batch:
                yield batch
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _generate_request(
    prompt_tokens: tuple[int, ...], sampling: Sampling, index: int
) -> GenerateRequest:
    """Return the engine's request for choice `index`; choices of one seed differ, repeatably."""
    return GenerateRequest(
        prompt_tokens=prompt_tokens,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=None if sampling.seed is None else sampling.seed + index,
        stop=sampling.stop,
        num_logprobs=sampling.num_logprobs,
    )


def _delta(choice: int, chunk: Chunk) -> Delta:
    return Delta(choice, chunk.text, chunk.token_ids, chunk.finish_reason, chunk.logprobs)


def _refused(message: str, code: str | None = None) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, message, code=code, param="prompt")
