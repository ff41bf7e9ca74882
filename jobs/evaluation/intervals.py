"""Confidence intervals of a difference between two models, from what was measured in pairs.

Takes arrays of values over the same sequences, prompts or rounds; gives an interval. It does not
know what was evaluated, and needs neither torch nor a model.
"""

import math

import numpy as np
from numpy.typing import NDArray

from cluster.config import StrictModel

_CONFIDENCE = 0.95
_ROWS_AT_ONCE = 256
_NAN = float("nan")


class Interval(StrictModel):
    """A point estimate with one-sided 95% bounds: the truth is below `upper` in 95% of cases.

    `lower` is the mirror bound, so [lower, upper] together cover 90%.
    """

    point: float
    lower: float
    upper: float


def perplexity_increase(
    base: NDArray[np.float64],
    candidate: NDArray[np.float64],
    *,
    samples: int,
    seed: int,
    num_judged: int = 1,
) -> Interval:
    """Return the relative rise of perplexity from `base` to `candidate`, as a ratio (0.02 is 2%).

    Both arrays are [N] mean losses in nats per token over the same N sequences. The bounds are
    one-sided 95% percentile bounds of a paired bootstrap over sequences (Efron and Tibshirani
    1993, chapter 13) of exp(mean difference) - 1: pairing removes what is common to both models,
    and a copy's difference is exactly 0. A loss that is not finite makes every number NaN, which
    the gate refuses. Where `num_judged` candidates are compared with one base, so that one of them
    may be taken, bounds hold for all at once (Bonferroni).
    """
    assert base.shape == candidate.shape, f"unpaired losses: {base.shape} and {candidate.shape}"
    differences = np.asarray(candidate, np.float64) - np.asarray(base, np.float64)
    found = bootstrapped_mean(differences, samples=samples, seed=seed, num_judged=num_judged)
    return Interval(
        point=float(np.expm1(found.point)),
        lower=float(np.expm1(found.lower)),
        upper=float(np.expm1(found.upper)),
    )


def bootstrapped_mean(
    values: NDArray[np.float64], *, samples: int, seed: int, num_judged: int = 1
) -> Interval:
    """Return the mean of [N] values with percentile bounds of a bootstrap over them.

    A value that is not finite makes every number NaN. `num_judged` as in `perplexity_increase`.
    """
    assert num_judged >= 1, "at least one is judged"
    assert values.ndim == 1, f"expected [N] values, found shape {values.shape}"
    assert values.size > 0, "no values to compare"
    if not np.isfinite(values).all():
        return Interval(point=_NAN, lower=_NAN, upper=_NAN)
    means = _resampled_means(values, samples, seed)
    beyond = (1 - _CONFIDENCE) / num_judged
    lower, upper = np.quantile(means, [beyond, 1 - beyond])
    return Interval(point=float(values.mean()), lower=float(lower), upper=float(upper))


def median_ratio(base: NDArray[np.float64], candidate: NDArray[np.float64]) -> Interval:
    """Return the median of candidate / base over [N] pairs of positive values, such as times.

    The bounds are order statistics: those of the sign test (Conover 1999, section 3.2), which
    holds whatever the noise is like, as one pause of the machine may be longer than all the rest.
    With fewer than five pairs there are no bounds at 95%; they are then 0 and infinity.
    """
    assert base.shape == candidate.shape, f"unpaired values: {base.shape} and {candidate.shape}"
    assert base.size > 0, "no values to compare"
    ratios = np.sort(np.asarray(candidate, np.float64) / np.asarray(base, np.float64))
    place = _sign_test_place(ratios.size)
    point = float(np.median(ratios))
    if place is None:
        return Interval(point=point, lower=0.0, upper=math.inf)
    return Interval(
        point=point, lower=float(ratios[place]), upper=float(ratios[ratios.size - 1 - place])
    )


def _sign_test_place(count: int) -> int | None:
    """Return the place, from the bottom, of the value below the true median in 95% of cases."""
    below, place = 0.0, None
    for number in range(count):
        below += math.comb(count, number) / 2**count
        if below > 1 - _CONFIDENCE:
            break
        place = number
    return place


def _resampled_means(values: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for start in range(0, samples, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, samples)
        picks = generator.integers(0, values.size, size=(stop - start, values.size))
        means[start:stop] = values[picks].mean(axis=1)
    return means
