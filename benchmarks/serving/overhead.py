"""What HTTP, keys and Ray Serve cost against the bare engine: `gateway_overhead`."""

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.serving.contender import Contender
from benchmarks.serving.workload import together

_ROUNDS = 7
_PAIRS = 200  # The two of one pair differ by 15 ms of themselves on a shared machine.


def measure(
    served: Contender, bare: Contender, vocab_size: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the added time to first token at one client and the throughput kept at 32.

    The same engine, options, model and prompts on the same cores, in turns.
    """
    for contender in (served, bare):
        contender.run(together(32, 128, 8, vocab_size))
    first_ms: dict[str, list[float]] = {"served": [], "bare": []}
    for turn in range(_PAIRS):
        request = together(1, 128, 2, vocab_size, turn)
        for name, contender in _in_turns(served, bare, turn):
            first_ms[name].append(1e3 * contender.run(request).first_token_s()[0])
    medians_ms = {name: median(values) for name, values in first_ms.items()}
    say(f"first token: served {medians_ms['served']:.1f} ms, bare {medians_ms['bare']:.1f} ms")
    rates: dict[str, list[float]] = {"served": [], "bare": []}
    for turn in range(_ROUNDS):
        requests = together(32, 128, 64, vocab_size, turn)
        for name, contender in _in_turns(served, bare, turn):
            rates[name].append(contender.run(requests).tokens_per_s)
    ratios = [s / b for s, b in zip(rates["served"], rates["bare"], strict=True)]
    added_ms = [s - b for s, b in zip(first_ms["served"], first_ms["bare"], strict=True)]
    return {
        "ttft_ms": median(added_ms),
        "throughput_ratio": median(ratios),
        "first_token_ms": medians_ms,
        "tokens_per_s": {name: median(values) for name, values in rates.items()},
        "ratios": ratios,
    }


def _in_turns(served: Contender, bare: Contender, turn: int) -> list[tuple[str, Contender]]:
    """Return both by name; each is first in every other turn."""
    both = [("served", served), ("bare", bare)]
    return both[::-1] if turn % 2 else both
