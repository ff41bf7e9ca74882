"""What HTTP, keys and Ray Serve cost against the bare engine: `gateway_overhead`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

from benchmarks.serving.contender import Contender
from benchmarks.serving.workload import together

# Two processes of one engine differ by 1% in speed, for as long as they live: 4 ms of a prompt that
# takes 430. So both are started several times.
_STARTS = 4
_ROUNDS = 2  # Of each start.
_PAIRS = 60  # Of each start; the two of one pair differ by 15 ms of themselves.

Start = Callable[[], AbstractContextManager[tuple[Contender, Contender]]]
_Both = dict[str, list[float]]


def measure(start: Start, vocab_size: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the added time to first token at one client and the throughput kept at 32.

    The same engine, options, model and prompts on the same cores, in turns. `start` gives the
    service and the bare engine, in processes of their own each time.
    """
    first_ms: _Both = {"served": [], "bare": []}
    rates: _Both = {"served": [], "bare": []}
    added_ms_by_start = []
    for number in range(_STARTS):
        with start() as (served, bare):
            for contender in (served, bare):
                contender.run(together(32, 128, 8, vocab_size))
            for turn in range(number * _PAIRS, (number + 1) * _PAIRS):
                request = together(1, 128, 2, vocab_size, turn)
                for name, contender in _in_turns(served, bare, turn):
                    first_ms[name].append(1e3 * contender.run(request).first_token_s()[0])
            added_ms_by_start.append(median(_added(first_ms)[-_PAIRS:]))
            say(f"start {number + 1}: first token {added_ms_by_start[-1]:+.1f} ms")
            for turn in range(number * _ROUNDS, (number + 1) * _ROUNDS):
                requests = together(32, 128, 64, vocab_size, turn)
                for name, contender in _in_turns(served, bare, turn):
                    rates[name].append(contender.run(requests).tokens_per_s)
    ratios = [s / b for s, b in zip(rates["served"], rates["bare"], strict=True)]
    return {
        "ttft_ms": median(_added(first_ms)),
        "ttft_ms_by_start": added_ms_by_start,
        "throughput_ratio": median(ratios),
        "first_token_ms": {name: median(values) for name, values in first_ms.items()},
        "tokens_per_s": {name: median(values) for name, values in rates.items()},
        "ratios": ratios,
    }


def _added(first_ms: _Both) -> list[float]:
    return [s - b for s, b in zip(first_ms["served"], first_ms["bare"], strict=True)]


def _in_turns(served: Contender, bare: Contender, turn: int) -> list[tuple[str, Contender]]:
    """Return both by name; each is first in every other turn."""
    both = [("served", served), ("bare", bare)]
    return both[::-1] if turn % 2 else both
