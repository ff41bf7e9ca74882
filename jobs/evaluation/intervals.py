"""Confidence intervals of a quality difference, from paired per-sequence losses.

Takes two arrays of losses over the same sequences; gives an interval. It does not know what was
evaluated, and needs neither torch nor a model.
"""

import numpy as np
from numpy.typing import NDArray

from cluster.config import StrictModel

_CONFIDENCE = 0.95
_ROWS_AT_ONCE = 256


class Interval(StrictModel):
    """A point estimate with one-sided 95% bounds: the truth is below `upper` in 95% of cases.

    `lower` is the mirror bound, so [lower, upper] together cover 90%.
    """

    point: float
    lower: float
    upper: float


def perplexity_increase(
    base: NDArray[np.float64], candidate: NDArray[np.float64], *, samples: int, seed: int
) -> Interval:
    """Return the relative rise of perplexity from `base` to `candidate`, as a ratio (0.02 is 2%).

    Both arrays are [N] mean losses in nats per token over the same N sequences. The bounds are
    one-sided 95% percentile bounds of a paired bootstrap over sequences (Efron and Tibshirani
    1993, chapter 13) of exp(mean difference) - 1: pairing removes what is common to both models.
    A loss that is not finite makes every number NaN, which the gate refuses.
    """
    assert base.shape == candidate.shape, f"unpaired losses: {base.shape} and {candidate.shape}"
    assert base.ndim == 1, f"expected [N] losses, found shape {base.shape}"
    assert base.size > 0, "no losses to compare"
    differences = np.asarray(candidate, np.float64) - np.asarray(base, np.float64)
    if not np.isfinite(differences).all():
        return Interval(point=float("nan"), lower=float("nan"), upper=float("nan"))
    means = _resampled_means(differences, samples, seed)
    lower, upper = np.quantile(means, [1 - _CONFIDENCE, _CONFIDENCE])
    return Interval(
        point=float(np.expm1(differences.mean())),
        lower=float(np.expm1(lower)),
        upper=float(np.expm1(upper)),
    )


def _resampled_means(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for start in range(0, samples, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, samples)
        picks = generator.integers(0, values.size, size=(stop - start, values.size))
        means[start:stop] = values[picks].mean(axis=1)
    return means
