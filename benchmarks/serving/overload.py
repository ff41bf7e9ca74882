"""Five times more work than can be done, for three minutes: `overload`."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from benchmarks.serving.http_client import Api, Reply, ask, ask_all
from benchmarks.serving.workload import Request, percentile, poisson

_CALIBRATE_S = 20.0
_CLIENTS = 32
_FACTOR = 5.0
_SAMPLE_S = 1.0


def measure(
    api: Api,
    vocab_size: int,
    resident_bytes: Callable[[], int],
    duration_s: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return goodput at five times capacity against its peak, refusals' times, and memory.

    Capacity is what 32 clients that wait for their answers get; its rate is the peak. Goodput
    counts whole answers. Memory is that of the gateway and the replicas.
    """
    peak_per_s = asyncio.run(_closed_loop(api, vocab_size))
    say(f"capacity {peak_per_s:.2f} requests/s")
    requests = poisson(_FACTOR * peak_per_s, duration_s, vocab_size)
    replies, memory = asyncio.run(_flood(api, requests, resident_bytes))
    whole = [reply for reply in replies if reply.is_whole]
    refused = [reply for reply in replies if reply.status == 429]
    last_s = max(reply.answered_s for reply in replies) - min(reply.asked_s for reply in replies)
    refusals_ms = [1e3 * (reply.answered_s - reply.asked_s) for reply in refused]
    quarter = len(memory) // 4
    return {
        "duration_s": duration_s,
        "capacity_per_s": peak_per_s,
        "offered_per_s": len(requests) / duration_s,
        "goodput_per_s": len(whole) / last_s,
        "goodput_ratio": len(whole) / last_s / peak_per_s,
        "refused": len(refused),
        "cut_short": len(replies) - len(whole) - len(refused),
        "refusal_ms": {
            "p50": percentile(refusals_ms, 0.5),
            "p99": percentile(refusals_ms, 0.99),
            "max": max(refusals_ms),
        },
        "memory_bytes": {"after_a_quarter": memory[quarter], "at_the_end": memory[-1]},
        "memory_growth_ratio": memory[-1] / memory[quarter] - 1,
    }


async def _closed_loop(api: Api, vocab_size: int) -> float:
    """Return requests answered per second with a fixed number of clients."""
    pool = poisson(100.0, 60.0, vocab_size)
    stop_s = time.perf_counter() + _CALIBRATE_S
    answered = 0

    async def client(number: int) -> None:
        nonlocal answered
        while time.perf_counter() < stop_s:
            number = (number + 37) % len(pool)
            reply = await ask(api, pool[number])
            answered += reply.is_whole

    start_s = time.perf_counter()
    await asyncio.gather(*(client(n) for n in range(_CLIENTS)))
    return answered / (time.perf_counter() - start_s)


async def _flood(
    api: Api, requests: list[Request], resident_bytes: Callable[[], int]
) -> tuple[list[Reply], list[int]]:
    memory: list[int] = []

    async def sample() -> None:
        while True:
            memory.append(resident_bytes())
            await asyncio.sleep(_SAMPLE_S)

    sampling = asyncio.create_task(sample())
    try:
        _, replies = await ask_all(api, requests)
    finally:
        sampling.cancel()
    memory.append(resident_bytes())
    return replies, memory
