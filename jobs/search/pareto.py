"""What is better than what when several things count: loss of quality, bytes and latency.

Takes points; gives non-dominated fronts, ranks and how far a point is beyond the limits. Pure: it
does not know what the points stand for.
"""

import math
from collections.abc import Sequence

from cluster.config import StrictModel
from jobs.config import GateConfig


class Point(StrictModel):
    """One candidate's objectives, all to be small; a latency of None was not measured."""

    candidate: int
    perplexity_increase: float
    size_ratio: float
    latency_ratio: float | None = None


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point dominates, smallest first."""
    best = [point for point, rank in zip(points, ranks(points), strict=True) if rank == 0]
    return sorted(best, key=lambda point: (point.size_ratio, point.perplexity_increase))


def ranks(points: Sequence[Point]) -> list[int | None]:
    """Return each point's non-dominated rank, 0 the best (Deb et al. 2002, NSGA-II).

    Latency counts only if every point has one. A point with a number that is not finite has no
    rank.
    """
    has_latency = all(point.latency_ratio is not None for point in points)
    values = {
        index: _objectives(point, has_latency=has_latency) for index, point in enumerate(points)
    }
    left = {index for index, value in values.items() if all(map(math.isfinite, value))}
    found: list[int | None] = [None] * len(points)
    rank = 0
    while left:
        best = {i for i in left if not any(_dominates(values[j], values[i]) for j in left)}
        for index in best:
            found[index] = rank
        left -= best
        rank += 1
    return found


def violation(point: Point, limits: GateConfig) -> float:
    """Return how far a point is beyond the limits: the sum of relative excesses, 0 if within."""
    pairs = [
        (point.perplexity_increase, limits.max_perplexity_increase),
        (point.size_ratio, limits.max_size_ratio),
    ]
    if limits.max_latency_ratio is not None and point.latency_ratio is not None:
        pairs.append((point.latency_ratio, limits.max_latency_ratio))
    if not all(math.isfinite(value) for value, _ in pairs):
        return math.inf
    return sum(max(0.0, value / limit - 1.0) for value, limit in pairs)


def _objectives(point: Point, *, has_latency: bool) -> tuple[float, ...]:
    pair = (point.perplexity_increase, point.size_ratio)
    if has_latency and point.latency_ratio is not None:
        return (*pair, point.latency_ratio)
    return pair


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and one != other
