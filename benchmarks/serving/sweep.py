"""Goodput against request rate: an open loop of mixed lengths, ours beside the peers, plotted.

Takes contenders and rates; gives, for each, requests per second answered within a limit of time to
first token and between tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.serving.contender import Contender
from benchmarks.serving.workload import Answers, Limit, percentile, poisson, together

LIMIT = Limit(first_token_s=1.0, between_tokens_s=0.1)
RATES_PER_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
DURATION_S = 20.0
_HOPELESS = 0.2


def measure(
    contenders: Mapping[str, Contender],
    vocab_size: int,
    say: Callable[[str], None],
    rates_per_s: Sequence[float] = RATES_PER_S,
) -> dict[str, Any]:
    """Return goodput and latencies by contender and rate.

    A contender whose goodput fell below a fifth of the rate is not asked at higher rates: its
    queue only grows.
    """
    for contender in contenders.values():
        contender.run(together(4, 64, 8, vocab_size))
    found: dict[str, dict[str, Any]] = {name: {} for name in contenders}
    for rate_per_s in rates_per_s:
        requests = poisson(rate_per_s, DURATION_S, vocab_size)
        for name, contender in contenders.items():
            before = list(found[name].values())
            if before and before[-1]["goodput_per_s"] < _HOPELESS * before[-1]["rate_per_s"]:
                continue
            figures = _figures(contender.run(requests), rate_per_s)
            found[name][str(rate_per_s)] = figures
            say(f"{rate_per_s:5.1f}/s {name:20} goodput {figures['goodput_per_s']:.2f}/s")
    return {
        "limit": {
            "first_token_s": LIMIT.first_token_s,
            "between_tokens_s": LIMIT.between_tokens_s,
        },
        "duration_s": DURATION_S,
        "contenders": found,
    }


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw goodput over offered rate, one line a contender."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, by_rate in found["contenders"].items():
        rates = [row["rate_per_s"] for row in by_rate.values()]
        goodput = [row["goodput_per_s"] for row in by_rate.values()]
        axes.plot(rates, goodput, marker="o", label=name)
    top = max(row["rate_per_s"] for rows in found["contenders"].values() for row in rows.values())
    axes.plot([0, top], [0, top], color="0.8", linestyle="--", zorder=0, label="all answered")
    limit = found["limit"]
    axes.set_title(
        f"Answered within {limit['first_token_s']:g} s to the first token and "
        f"{1e3 * limit['between_tokens_s']:g} ms between tokens"
    )
    axes.set_xlabel("requests offered per second")
    axes.set_ylabel("requests answered in time per second")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _figures(answers: Answers, rate_per_s: float) -> dict[str, Any]:
    first_s, between_s = answers.first_token_s(), answers.between_tokens_s()
    return {
        "rate_per_s": rate_per_s,
        "num_requests": len(answers.requests),
        "goodput_per_s": rate_per_s * answers.share_within(LIMIT),
        "tokens_per_s": answers.tokens_per_s,
        "first_token_ms": {
            "p50": 1e3 * percentile(first_s, 0.5),
            "p95": 1e3 * percentile(first_s, 0.95),
        },
        "between_tokens_ms": {
            "p50": 1e3 * percentile(between_s, 0.5),
            "p95": 1e3 * percentile(between_s, 0.95),
        },
    }
