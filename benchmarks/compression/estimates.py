"""Figures over several models and held-out sequences, with intervals, and what they must show.

Takes every model's losses of every contender on the same sequences; gives a figure's mean over the
models with a 95% interval from resampled sequences. It does not know what the contenders are.

N sequences, S resamples
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import StrictModel

Array = NDArray[np.float64]
Losses = Mapping[str, Array]  # by contender, [N] nats per token
Means = Mapping[str, Array]  # by contender, mean losses of S resamples, or of all sequences
Figure = Callable[[Means], Array]

_SAMPLES = 2000
_TAIL = 0.025


class Estimate(StrictModel):
    """A figure's mean over models, two-sided 95% bounds, and each model's own."""

    mean: float
    lower: float
    upper: float
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Claim:
    """A figure beside the limit that it must keep."""

    name: str
    found: float
    limit: float
    is_upper: bool

    def document(self) -> dict[str, Any]:
        """Return the figure, its limit and whether it keeps it."""
        is_met = self.found <= self.limit if self.is_upper else self.found >= self.limit
        kind = "at_most" if self.is_upper else "at_least"
        return {"found": self.found, kind: self.limit, "is_met": bool(is_met)}


def at_most(name: str, found: float, limit: float) -> Claim:
    """Return a claim that a figure does not exceed a limit."""
    return Claim(name, found, limit, is_upper=True)


def at_least(name: str, found: float, limit: float) -> Claim:
    """Return a claim that a figure reaches a limit."""
    return Claim(name, found, limit, is_upper=False)


def estimate(models: Sequence[Losses], figure: Figure, *, samples: int = _SAMPLES) -> Estimate:
    """Return a figure's mean over models with the 95% interval of a paired bootstrap.

    Sequences are resampled for all contenders and models together (Efron and Tibshirani 1993,
    chapter 13), so what is common to them cancels. The spread over models is not in the interval:
    a few models do not determine it, and `per_seed` shows it.
    """
    sizes = {len(losses) for model in models for losses in model.values()}
    assert len(sizes) == 1, f"losses of different numbers of sequences: {sorted(sizes)}"
    counts_SN = _counts(sizes.pop(), samples)
    points = [figure({name: losses.mean() for name, losses in model.items()}) for model in models]
    drawn_S = np.mean(
        [figure({name: counts_SN @ losses for name, losses in model.items()}) for model in models],
        axis=0,
    )
    lower, upper = np.quantile(drawn_S, [_TAIL, 1 - _TAIL])
    return Estimate(
        mean=float(np.mean(points)),
        lower=float(lower),
        upper=float(upper),
        per_seed=tuple(float(point) for point in points),
    )


def increase(contender: str, base: str) -> Figure:
    """Return the relative rise of perplexity over another contender's (0.02 is 2%)."""
    return lambda means: np.expm1(means[contender] - means[base])


def recovery(method: str, naive: str, dense: str) -> Figure:
    """Return the share of a naive contender's damage that a method avoids, in perplexity."""

    def share(means: Means) -> Array:
        worst, found, best = (np.exp(means[name]) for name in (naive, method, dense))
        return (worst - found) / (worst - best)

    return share


@lru_cache(maxsize=4)
def _counts(num_sequences: int, samples: int) -> Array:
    """Return how often each sequence is drawn, over their number: [S, N]."""
    shares = np.full(num_sequences, 1 / num_sequences)
    drawn = np.random.default_rng(0).multinomial(num_sequences, shares, size=samples)
    return drawn / num_sequences
