"""Clients that leave, and calls against a budget: `cancel`."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.http_client import Api, Reply, ask, ask_all
from benchmarks.serving.workload import Request, percentile, together

_NUM_CLIENTS = 500
_AT_A_TIME = 50
_NUM_CALLS = 200
_PROMPT_TOKENS = 32
_ANSWER_TOKENS = 256
# Every other wave leaves one by one, after so many tokens (None: before the first), the others all
# at once, while prompts are read or while all their answers are being generated.
_LEAVE_AFTER_TOKENS = (None, 1, 2, 5, 10)
_LEAVE_AFTER_S = (0.05, 0.2, 0.5, 1.0, 2.0)
# An engine that works keeps at least half a core busy, one that idles a few hundredths of it.
_BUSY_SHARE = 0.25
_SAMPLE_S = 0.05
_STILL_S = 0.5
_GIVE_UP_S = 30.0


@dataclass(frozen=True)
class Probe:
    """What is seen of the service from outside: numbers that only grow."""

    engine_cpu_s: Callable[[], float]  # The operating system's count of the replica's process.
    computed: Callable[[], int]  # Tokens that the engine generated, a second late.
    charged: Callable[[], int]  # Tokens that the ledger charged for, once all is settled.


def leave(api: Api, vocab_size: int, probe: Probe) -> dict[str, Any]:
    """Return how soon the engine's work ends after waves of clients left, and what was charged.

    Work has ended when the replica's process uses no more time of the processor; what the engine
    says of itself is not asked. A client that leaves after n tokens is charged for what was sent to
    it besides: a token or two, and what lay in buffers.
    """
    requests = together(_NUM_CLIENTS, _PROMPT_TOKENS, _ANSWER_TOKENS, vocab_size)
    charged, computed = probe.charged(), probe.computed()
    work_s, received = [], 0
    for number in range(_NUM_CLIENTS // _AT_A_TIME):
        wave = requests[number * _AT_A_TIME : (number + 1) * _AT_A_TIME]
        together_s = _LEAVE_AFTER_S[number // 2] if number % 2 else None
        left_s, replies = asyncio.run(_wave(api, wave, together_s))
        received += sum(len(reply.content.tokens) for reply in replies)
        work_s.append(_work_after(probe.engine_cpu_s, left_s))
    return {
        "clients": _NUM_CLIENTS,
        "at_a_time": _AT_A_TIME,
        "work_ends_after_s": {"p50": percentile(work_s, 0.5), "max": max(work_s)},
        "work_ends_after_s_by_wave": work_s,
        "tokens_asked": sum(request.max_tokens for request in requests),
        "tokens_received": received,
        "tokens_charged": probe.charged() - charged,
        "tokens_computed": probe.computed() - computed,
    }


def budget(
    api: Api, vocab_size: int, budget_tokens: int, spent: Callable[[], int]
) -> dict[str, Any]:
    """Return what 200 parallel calls spent of a budget that covers a part of them."""
    requests = together(_NUM_CALLS, _PROMPT_TOKENS, 32, vocab_size)
    _, replies = asyncio.run(ask_all(api, requests))
    answered = [reply for reply in replies if reply.content.is_whole]
    refused = [reply for reply in replies if reply.content.status == 429]
    spent_tokens = spent()
    return {
        "calls": _NUM_CALLS,
        "answered": len(answered),
        "refused": len(refused),
        "other": _NUM_CALLS - len(answered) - len(refused),
        "budget_tokens": budget_tokens,
        "spent_tokens": spent_tokens,
        "overspend_tokens": max(0, spent_tokens - budget_tokens),
    }


async def _wave(
    api: Api, wave: list[Request], together_s: float | None
) -> tuple[float, list[Reply]]:
    """Return when the last client had left, and what each received."""

    async def one(number: int, request: Request) -> Reply:
        if together_s is not None:
            return await ask(api, request, leave_after_s=together_s)
        after = _LEAVE_AFTER_TOKENS[number % len(_LEAVE_AFTER_TOKENS)]
        after_s = _LEAVE_AFTER_S[0] if after is None else None
        return await ask(api, request, leave_after=after, leave_after_s=after_s)

    replies = await asyncio.gather(*(one(n, r) for n, r in enumerate(wave)))
    return time.perf_counter(), list(replies)


def _work_after(engine_cpu_s: Callable[[], float], left_s: float) -> float:
    """Return how long after `left_s` the process last kept a processor busy."""
    busy_s = left_s
    now_s, used_s = time.perf_counter(), engine_cpu_s()
    while now_s - busy_s < _STILL_S and now_s - left_s < _GIVE_UP_S:
        time.sleep(_SAMPLE_S)
        before_s, before_used_s = now_s, used_s
        now_s, used_s = time.perf_counter(), engine_cpu_s()
        if used_s - before_used_s > _BUSY_SHARE * (now_s - before_s):
            busy_s = now_s
    return busy_s - left_s
