"""Clients that leave, and calls against a budget: `cancel`."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from benchmarks.serving.http_client import Api, Reply, ask, ask_all
from benchmarks.serving.workload import Request, percentile, together

_NUM_CLIENTS = 500
_AT_A_TIME = 50
_NUM_CALLS = 200
_PROMPT_TOKENS = 32
_ANSWER_TOKENS = 256
_LEAVE_AFTER = (0, 1, 2, 5, 10)


def leave(
    api: Api,
    vocab_size: int,
    running: Callable[[], int],
    charged: Callable[[], int],
) -> dict[str, Any]:
    """Return how soon the engine is idle after waves of clients left, and what was charged.

    `running` says how many sequences the engine holds, `charged` the generated tokens in the
    ledger. A client that leaves after n tokens may be charged for what was under way besides: a
    token or two, and what lay in buffers.
    """
    requests = together(_NUM_CLIENTS, _PROMPT_TOKENS, _ANSWER_TOKENS, vocab_size)
    before, idle_s, received, asked = charged(), [], 0, 0
    for start in range(0, _NUM_CLIENTS, _AT_A_TIME):
        wave = requests[start : start + _AT_A_TIME]
        replies = asyncio.run(_wave(api, wave))
        received += sum(len(reply.tokens) for reply in replies)
        asked += sum(request.max_tokens for request in wave)
        idle_s.append(_idle_after(running))
    return {
        "clients": _NUM_CLIENTS,
        "idle_after_s": {"p50": percentile(idle_s, 0.5), "max": max(idle_s)},
        "tokens_asked": asked,
        "tokens_received": received,
        "tokens_charged": charged() - before,
    }


def budget(
    api: Api, vocab_size: int, budget_tokens: int, spent: Callable[[], int]
) -> dict[str, Any]:
    """Return what 200 parallel calls spent of a budget that covers a part of them."""
    requests = together(_NUM_CALLS, _PROMPT_TOKENS, 32, vocab_size)
    _, replies = asyncio.run(ask_all(api, requests))
    answered = [reply for reply in replies if reply.is_whole]
    refused = [reply for reply in replies if reply.status == 429]
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


async def _wave(api: Api, wave: list[Request]) -> list[Reply]:
    async def one(number: int, request: Request) -> Reply:
        after = _LEAVE_AFTER[number % len(_LEAVE_AFTER)]
        if after == 0:
            return await _leave_at_once(api, request)
        return await ask(api, request, leave_after=after)

    return list(await asyncio.gather(*(one(n, r) for n, r in enumerate(wave))))


async def _leave_at_once(api: Api, request: Request) -> Reply:
    try:
        return await asyncio.wait_for(ask(api, request), 0.05)
    except TimeoutError:
        return Reply()


def _idle_after(running: Callable[[], int]) -> float:
    start_s = time.perf_counter()
    while running():
        if time.perf_counter() - start_s > 30:
            break
        time.sleep(0.02)
    return time.perf_counter() - start_s
