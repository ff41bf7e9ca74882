"""Assignments worth trying: fronts of a knapsack problem, and small changes of good ones.

Takes what each choice adds to the loss, the bytes and the latency of a model; gives assignments.
Pure.

Where all three are sums over groups, the best assignment under limits on bytes and latency is a
knapsack problem. With a price for a byte and one for a microsecond it falls apart into a choice for
every group (Lagrangian relaxation; Everett 1963); sweeping the prices gives the convex part of the
front, and exchanging single choices what lies between.

S groups, C choices
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jobs.search.space import Assignment

_PRICES = np.logspace(-3, 3, 49)  # Of all that can be saved, over the loss that it costs at most.


def priced(
    rises_SC: NDArray[np.float64],
    bytes_SC: NDArray[np.float64],
    latency_SC: NDArray[np.float64] | None = None,
) -> list[Assignment]:
    """Return the distinct best assignments under a sweep of prices.

    Without `latency_SC` latency has no price: that is the additive knapsack of loss against bytes.
    """
    loss_SC = rises_SC / _span(rises_SC)
    size_SC = bytes_SC / _span(bytes_SC)
    time_SC = np.zeros_like(size_SC) if latency_SC is None else latency_SC / _span(latency_SC)
    found: dict[Assignment, None] = {}
    for time_price in [0.0] if latency_SC is None else [0.0, *_PRICES[::6]]:
        for size_price in [0.0, *_PRICES]:
            cost_SC = loss_SC + size_price * size_SC + time_price * time_SC
            found[tuple(int(choice) for choice in cost_SC.argmin(axis=1))] = None
    return list(found)


def neighbours(
    assignments: Sequence[Assignment], num_choices: int, count: int, generator: random.Random
) -> Iterator[Assignment]:
    """Give up to `count` assignments that differ from a given one in one to three groups."""
    if not assignments or num_choices < 2:
        return
    for _ in range(count):
        changed = list(generator.choice(assignments))
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(changed))] = generator.randrange(num_choices)
        yield tuple(changed)


def _span(values_SC: NDArray[np.float64]) -> float:
    """Return how much all groups together can change, at least a little."""
    return max(float((values_SC.max(axis=1) - values_SC.min(axis=1)).sum()), 1e-12)
