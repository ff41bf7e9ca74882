"""A small team beside one with fifty times its load: `fairness`."""

import asyncio
import random
import time
from typing import Any

from benchmarks.serving.http_client import Api, ask
from benchmarks.serving.workload import Request, percentile

_LOAD_RATIO = 50
_DURATION_S = 40.0
_THINK_S = 0.5


def measure(small: Api, large: Api, vocab_size: int) -> dict[str, Any]:
    """Return the small team's p95 latency alone and beside a team with fifty times its clients.

    Every client asks, waits for the whole answer, thinks half a second, and asks again.
    """
    alone_s = asyncio.run(_clients(small, 1, vocab_size))
    beside_s, others_s = asyncio.run(_both(small, large, vocab_size))
    p95_alone_s, p95_beside_s = percentile(alone_s, 0.95), percentile(beside_s, 0.95)
    return {
        "alone_ms": {"p50": 1e3 * percentile(alone_s, 0.5), "p95": 1e3 * p95_alone_s},
        "beside_ms": {"p50": 1e3 * percentile(beside_s, 0.5), "p95": 1e3 * p95_beside_s},
        "ratio_p95": p95_beside_s / p95_alone_s,
        "load_ratio": _LOAD_RATIO,
        "answered": {"alone": len(alone_s), "beside": len(beside_s), "large": len(others_s)},
        "large_ms": {
            "p50": 1e3 * percentile(others_s, 0.5),
            "p95": 1e3 * percentile(others_s, 0.95),
        },
    }


async def _both(small: Api, large: Api, vocab_size: int) -> tuple[list[float], list[float]]:
    large_task = asyncio.create_task(_clients(large, _LOAD_RATIO, vocab_size))
    await asyncio.sleep(5.0)
    small_s = await _clients(small, 1, vocab_size, _DURATION_S - 10.0)
    return small_s, await large_task


async def _clients(
    api: Api, count: int, vocab_size: int, duration_s: float = _DURATION_S
) -> list[float]:
    latencies_s: list[float] = []
    stop_s = time.perf_counter() + duration_s

    async def client(number: int) -> None:
        draws = random.Random(f"{api.key} {number}")
        while time.perf_counter() < stop_s:
            prompt = tuple(draws.randrange(2, vocab_size) for _ in range(128))
            reply = await ask(api, Request(0.0, prompt, 32))
            if reply.content.is_whole:
                latencies_s.append(reply.answered_s - reply.asked_s)
            await asyncio.sleep(_THINK_S)

    await asyncio.gather(*(client(n) for n in range(count)))
    return latencies_s
