"""Time to first token when a long prefix was seen before: `prefix`."""

import asyncio
import random
from statistics import median
from typing import Any

from benchmarks.serving.http_client import Api, ask
from benchmarks.serving.workload import Request

_PREFIX_TOKENS = 512
_TAIL_TOKENS = 16
_ROUNDS = 7


def measure(api: Api, vocab_size: int) -> dict[str, Any]:
    """Return times to first token of first and second requests with the same 512 tokens."""
    draws = random.Random(0)
    pairs = [asyncio.run(_pair(api, draws, vocab_size)) for _ in range(_ROUNDS + 1)][1:]
    ratios = [first / second for first, second in pairs]
    return {
        "prefix_tokens": _PREFIX_TOKENS,
        "first_ms": 1e3 * median([first for first, _ in pairs]),
        "second_ms": 1e3 * median([second for _, second in pairs]),
        "ratio": median(ratios),
        "ratios": ratios,
    }


async def _pair(api: Api, draws: random.Random, vocab_size: int) -> tuple[float, float]:
    def some(count: int) -> tuple[int, ...]:
        return tuple(draws.randrange(2, vocab_size) for _ in range(count))

    prefix, times_s = some(_PREFIX_TOKENS), []
    for _ in range(2):
        reply = await ask(api, Request(0.0, prefix + some(_TAIL_TOKENS), 4))
        assert reply.content.is_whole, reply.content.error
        times_s.append(reply.content.times_s[0] - reply.asked_s)
    return times_s[0], times_s[1]
