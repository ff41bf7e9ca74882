"""Five times more work than can be done, for three minutes: `overload`."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.http_client import Api, Reply, ask, ask_all
from benchmarks.serving.workload import Request, fresh, percentile, poisson

_CLIENTS = 32
_WARM_UP_S = 10.0
_FACTOR = 5.0
_TICK_S = 0.02
_MEMORY_EVERY_S = 1.0


@dataclass
class _Watched:
    """What was seen while requests were under way."""

    lags_s: list[float] = field(default_factory=list)  # How late this process itself was.
    memory_bytes: list[int] = field(default_factory=list)


def measure(
    api: Api,
    vocab_size: int,
    resident_bytes: Callable[[], int],
    durations_s: tuple[float, float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return goodput at five times capacity against its peak, refusals' times, and memory.

    Capacity is what 32 clients get that ask one request after another, once all of them are at it.
    The peak is what they get of requests of the very lengths that were answered in the flood, so
    that both rates are of the same work. Goodput counts whole answers that ended while requests
    came, after the same time to warm up. Memory is that of the gateway and the replicas.
    `durations_s` are those of the first part and of each of the others.
    """
    first_s, flood_s = durations_s
    pool = poisson(100.0, 60.0, vocab_size)
    capacity = asyncio.run(_closed_loop(api, pool, first_s))
    say(f"capacity {capacity['per_s']:.2f} requests/s")
    requests = poisson(_FACTOR * capacity["per_s"], flood_s, vocab_size, turn=1)

    async def flood() -> tuple[list[Reply], _Watched]:
        async with _watch(resident_bytes) as watched:
            _, replies = await ask_all(api, requests)
        return replies, watched

    replies, watched = asyncio.run(flood())
    start_s = min(reply.asked_s for reply in replies) + _WARM_UP_S
    counted_s = flood_s - _WARM_UP_S
    whole = [reply for reply in replies if reply.content.is_whole]
    refused = [reply for reply in replies if reply.content.status == 429]
    goodput = _rates(whole, start_s, counted_s)
    say(f"goodput {goodput['per_s']:.2f} requests/s, {len(refused)} refused")
    counted = {id(reply) for reply in _ended(whole, start_s, counted_s)}
    answered = [q for q, reply in zip(requests, replies, strict=True) if id(reply) in counted]
    again = fresh([*answered, *answered], vocab_size)  # Enough to warm up, too.
    peak = asyncio.run(_closed_loop(api, again, counted_s))
    say(f"peak {peak['per_s']:.2f} requests/s")
    return {
        "duration_s": flood_s,
        "offered_per_s": len(requests) / flood_s,
        "capacity": capacity,
        "peak": peak,
        "goodput": goodput,
        "goodput_ratio": goodput["per_s"] / peak["per_s"],
        "tokens_ratio": goodput["tokens_per_s"] / peak["tokens_per_s"],
        "answered": len(whole),
        "refused": len(refused),
        "cut_short": len(replies) - len(whole) - len(refused),
        "refusal_ms": _spread_ms([reply.answered_s - reply.asked_s for reply in refused]),
        "refusals_within_50_ms": _within(0.05, refused),
        "clients_lag_ms": _spread_ms(watched.lags_s),
        "first_token_ms": _spread_ms([reply.content.times_s[0] - reply.asked_s for reply in whole]),
        **_growth(watched.memory_bytes),
    }


@contextmanager
def cores_at_once() -> Iterator[bool]:
    """Give this thread a core whenever it asks, and yield whether the system allows it.

    Clients on machines of their own never wait for the server's cores. Beside it they do: Linux
    shares cores among terminal sessions first, and an answer was seen to lie in its socket for 44
    ms because the engine's session had the core. Real-time scheduling takes root or CAP_SYS_NICE.
    """
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, policy, priority)


async def _closed_loop(api: Api, pool: Sequence[Request], duration_s: float) -> dict[str, float]:
    """Return what a fixed number of clients get a second, after they have warmed up."""
    start_s = time.perf_counter() + _WARM_UP_S
    stop_s = start_s + duration_s
    whole: list[Reply] = []

    async def client(number: int) -> None:
        while time.perf_counter() < stop_s:
            number = (number + _CLIENTS) % len(pool)
            reply = await ask(api, pool[number])
            if reply.content.is_whole:
                whole.append(reply)

    await asyncio.gather(*(client(n) for n in range(_CLIENTS)))
    return _rates(whole, start_s, duration_s)


def _rates(whole: Sequence[Reply], start_s: float, duration_s: float) -> dict[str, float]:
    """Return answers that ended within a time, and their tokens, by the second."""
    ended = _ended(whole, start_s, duration_s)
    num_tokens = sum(len(reply.content.tokens) for reply in ended)
    return {"per_s": len(ended) / duration_s, "tokens_per_s": num_tokens / duration_s}


def _ended(replies: Sequence[Reply], start_s: float, duration_s: float) -> list[Reply]:
    return [r for r in replies if start_s <= r.answered_s < start_s + duration_s]


@asynccontextmanager
async def _watch(resident_bytes: Callable[[], int]) -> AsyncIterator[_Watched]:
    watched = _Watched()

    async def tick() -> None:
        while True:
            due_s = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            watched.lags_s.append(time.perf_counter() - due_s)

    async def weigh() -> None:
        while True:
            watched.memory_bytes.append(await asyncio.to_thread(resident_bytes))
            await asyncio.sleep(_MEMORY_EVERY_S)

    tasks = [asyncio.create_task(tick()), asyncio.create_task(weigh())]
    try:
        yield watched
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _within(limit_s: float, replies: Sequence[Reply]) -> float:
    """Return the share of replies that were complete within a time."""
    return sum(r.answered_s - r.asked_s <= limit_s for r in replies) / len(replies)


def _spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: 1e3 * percentile(seconds, share) for name, share in shares.items()}


def _growth(memory_bytes: Sequence[int]) -> dict[str, Any]:
    """Return memory at each quarter of the time, and by how much it grew after the first."""
    quarters = [memory_bytes[(len(memory_bytes) - 1) * part // 4] for part in range(5)]
    return {
        "memory_bytes_by_quarter": quarters,
        "memory_growth_ratio": quarters[-1] / quarters[1] - 1,
    }
