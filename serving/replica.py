"""A replica: one process that owns one engine and answers for it.

Takes requests from gateways; gives batches of events. It does not know HTTP, keys, connections or
the registry: the directory that it is given holds exactly one version of one model.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Any

import serving.engines
from cluster.errors import ContextLengthError, EngineError, RequestError
from jobs.data.tokenizer import load_tokenizer
from jobs.plugins import load_plugin
from serving.engines._protocol import (
    Chunk,
    EmbeddingEngine,
    Engine,
    EngineStats,
    GenerateRequest,
    Grammar,
)
from serving.messages import (
    ENGINE_FAILED,
    GENERATION_FAILED,
    Delta,
    Embedded,
    EmbeddingRequest,
    Event,
    InferenceRequest,
    Prompt,
    Refused,
    Started,
    Task,
    TextPrompt,
    TokenPrompt,
)
from serving.prompts import PromptEncoder

_logger = logging.getLogger(__name__)
# Shorter texts are encoded at once: a thread's hop takes longer than their 0.2 ms.
_MOST_INLINE_CHARACTERS = 4096
_MODEL_FAILED = Refused(
    HTTPStatus.INTERNAL_SERVER_ERROR,
    "the model failed at this request. The operator finds the reason in the replica's log.",
    code=GENERATION_FAILED,
)


class EngineReplica:
    """Runs one engine; a server and Ray Serve wrap it, a test calls it as it is."""

    def __init__(self, directory: str, engine: str, options: Mapping[str, Any]) -> None:
        """Load the model, every digest checked, and start the engine."""
        plugin = load_plugin(serving.engines, engine, what="engine")
        self._prompts = PromptEncoder(load_tokenizer(Path(directory)))
        self._engine = plugin.create(Path(directory), options)
        generates = self._engine.info().task == "generate"
        self._generator: Engine | None = self._engine if generates else None
        self._embedder: EmbeddingEngine | None = None if generates else self._engine
        _logger.info("serving %s: %s", directory, self._engine.info())

    async def generate(self, request: InferenceRequest) -> AsyncGenerator[list[Event], None]:
        """Yield what happens, several events at a time if the reader is slow; closing cancels."""
        if self._generator is None:
            yield [_wrong_task("generate text", "/v1/embeddings")]
            return
        try:
            prompts = await self._encode(request.prompts)
            streams = {
                choice: self._generator.generate(_generate_request(prompts, request, choice))
                for choice in range(request.total_choices)
                if choice not in request.finished
            }
            # Said with the first tokens: a request that the engine refuses has not started.
            started: list[Event] = [Started(sum(map(len, prompts)))]
            async with aclosing(merge(streams)) as batches:
                async for batch in batches:
                    yield [*started, *(_delta(choice, chunk) for choice, chunk in batch)]
                    started = []
        except (RequestError, EngineError) as error:
            yield [self._refusal(error, "prompt")]

    async def embed(self, request: EmbeddingRequest) -> Embedded | Refused:
        """Return a vector for each input, cut to the dimensions that were asked for."""
        if self._embedder is None:
            return _wrong_task("embed", "/v1/completions")
        try:
            inputs = await self._encode(request.inputs)
            vectors = await self._embedder.embed(inputs, request.team)
            cut = tuple(_cut(vector, request.dimensions) for vector in vectors)
        except (RequestError, EngineError) as error:
            return self._refusal(error, "input")
        return Embedded(cut, sum(map(len, inputs)))

    @property
    def task(self) -> Task:
        """What the model is for."""
        return "embed" if self._generator is None else "generate"

    @property
    def context_tokens(self) -> int:
        """How many tokens a prompt and its answer can have."""
        return int(self._engine.info().max_len)

    def stats(self) -> EngineStats:
        """Return the load now; raises EngineError if the engine stopped."""
        stats: EngineStats = self._engine.stats()
        return stats

    def check_health(self) -> None:
        """Raise EngineError if the engine stopped; Ray Serve then starts another replica."""
        self._engine.stats()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _refusal(self, error: RequestError | EngineError, param: str) -> Refused:
        if isinstance(error, RequestError):
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
            return Refused(HTTPStatus.BAD_REQUEST, error.message, code=code, param=param)
        _logger.error("a request failed", exc_info=error)
        try:
            self._engine.stats()
        except EngineError:
            return Refused(HTTPStatus.SERVICE_UNAVAILABLE, error.message, code=ENGINE_FAILED)
        # The engine lives, so it is the model that fails: no other replica would do better. What it
        # says is of this process and may hold parts of the request: it stays in the log.
        return _MODEL_FAILED

    async def _encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        def encode() -> list[tuple[int, ...]]:
            return [self._prompts.encode(prompt) for prompt in prompts]

        return encode() if _is_short(prompts) else await asyncio.to_thread(encode)


async def merge(
    streams: Mapping[int, AsyncIterator[Chunk]],
) -> AsyncGenerator[list[tuple[int, Chunk]], None]:
    """Yield chunks of all streams as they come, with their stream's number; closing closes all.

    The first exception of any stream ends all of them and is raised.
    """
    if len(streams) == 1:  # Most requests, and nothing to merge.
        ((number, stream),) = streams.items()
        async with aclosing(stream) as chunks:  # type: ignore[type-var]  # engines' generators
            async for chunk in chunks:
                yield [(number, chunk)]
        return
    async with aclosing(_merge_several(streams)) as batches:
        async for batch in batches:
            yield batch


async def _merge_several(
    streams: Mapping[int, AsyncIterator[Chunk]],
) -> AsyncGenerator[list[tuple[int, Chunk]], None]:
    arrived: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncIterator[Chunk]) -> None:
        try:
            async for chunk in stream:
                arrived.put_nowait((number, chunk))
            arrived.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
            arrived.put_nowait(error)

    pumps = [asyncio.create_task(pump(*numbered)) for numbered in streams.items()]
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


def _is_short(prompts: Sequence[Prompt]) -> bool:
    characters = 0
    for prompt in prompts:
        if isinstance(prompt, TokenPrompt):
            continue
        if not isinstance(prompt, TextPrompt):
            return False
        characters += len(prompt.text)
    return characters <= _MOST_INLINE_CHARACTERS


def _generate_request(
    prompts: Sequence[tuple[int, ...]], request: InferenceRequest, choice: int
) -> GenerateRequest:
    """Return the engine's request for one choice; those of one seed differ, repeatably."""
    sampling, structure = request.sampling, request.sampling.structure
    prompt, index = divmod(choice, request.num_choices)
    return GenerateRequest(
        prompt_tokens=prompts[prompt],
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        grammar=None if structure is None else Grammar(kind=structure.kind, text=structure.text),
        seed=None if sampling.seed is None else sampling.seed + index,
        stop=sampling.stop,
        num_logprobs=sampling.num_logprobs,
        ignore_eos=sampling.ignore_eos,
        adapter=request.adapter,
        tenant=request.team,
        resumed_tokens=request.resumed[choice] if request.resumed else (),
    )


def _delta(choice: int, chunk: Chunk) -> Delta:
    return Delta(
        choice,
        chunk.text,
        chunk.token_ids,
        chunk.finish_reason,
        chunk.logprobs,
        chunk.cached_tokens,
    )


def _wrong_task(verb: str, route: str) -> Refused:
    message = f"this model does not {verb}. Use {route} with it, or ask another model."
    return Refused(HTTPStatus.BAD_REQUEST, message, param="model")


def _cut(vector: Sequence[float], dimensions: int | None) -> tuple[float, ...]:
    """Return the first dimensions at unit length."""
    if dimensions is None:
        return tuple(vector)
    if dimensions > len(vector):
        raise RequestError(
            f"`dimensions` = {dimensions}; this model's vectors have {len(vector)}. Ask for fewer."
        )
    kept = vector[:dimensions]
    length = math.hypot(*kept)
    return tuple(value / length for value in kept) if length else tuple(kept)
