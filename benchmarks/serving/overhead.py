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

    def first_token_ms(contender: Contender, turn: int) -> float:
        return 1e3 * contender.run(together(1, 128, 2, vocab_size, turn)).first_token_s()[0]

    def tokens_per_s(contender: Contender, turn: int) -> float:
        return contender.run(together(32, 128, 64, vocab_size, turn)).tokens_per_s

    first_ms: _Both = {"served": [], "bare": []}
    rates: _Both = {"served": [], "bare": []}
    added_ms_by_start = []
    for number in range(_STARTS):
        with start() as both:
            for contender in both:
                contender.run(together(32, 128, 8, vocab_size))
            _take_turns(
                both, range(number * _PAIRS, (number + 1) * _PAIRS), first_token_ms, first_ms
            )
            added_ms_by_start.append(median(_added(first_ms)[-_PAIRS:]))
            say(f"start {number + 1}: first token {added_ms_by_start[-1]:+.1f} ms")
            _take_turns(both, range(number * _ROUNDS, (number + 1) * _ROUNDS), tokens_per_s, rates)
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


def _take_turns(
    both: tuple[Contender, Contender],
    turns: range,
    ask: Callable[[Contender, int], float],
    found: _Both,
) -> None:
    """Add what both give in every turn; each is first in every other one."""
    named = list(zip(found, both, strict=True))
    for turn in turns:
        for name, contender in named[::-1] if turn % 2 else named:
            found[name].append(ask(contender, turn))
