"""What is better than what when several things count: loss of quality, bytes and latency.

Takes points; gives non-dominated fronts, ranks, how far a point is beyond the limits, and how much
of the space of worse models a set of points dominates. Pure: it does not know what the points stand
for.
"""

import bisect
import math
from collections.abc import Sequence

from cluster.config import StrictModel
from jobs.config import GateConfig

Objectives = tuple[float, ...]


class Point(StrictModel):
    """One candidate's objectives, all to be small; a latency of None was not measured."""

    candidate: int = 0
    """Whatever number the caller knows it by."""
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


def shares(point: Point, limits: GateConfig) -> Objectives:
    """Return a point's objectives as shares of the worst that counts, at most 1 where it counts.

    The worst are the limit of the perplexity increase and the unchanged model's bytes and latency.
    A perplexity below the unchanged model's is no better than its equal; one that is no number is
    infinitely bad.
    """
    increase = point.perplexity_increase / limits.max_perplexity_increase
    increase = max(0.0, increase) if math.isfinite(increase) else math.inf
    latency = () if point.latency_ratio is None else (point.latency_ratio,)
    return (increase, point.size_ratio, *latency)


def hypervolume(points: Sequence[Objectives]) -> float:
    """Return the share of the unit cube that is dominated by at least one point, in [0, 1].

    Points have one to three objectives, all to be small; what is not below 1 dominates nothing.
    Source: Zitzler and Thiele 1999; by slices along the last objective.
    """
    inside = [p for p in points if all(math.isfinite(v) and v < 1.0 for v in p)]
    if not inside:
        return 0.0
    # Fewer objectives are three of which the others are always 0.
    members = sorted((_padded(point) for point in inside), key=lambda point: point[2])
    stairs: list[tuple[float, float]] = []
    area = volume = 0.0
    for number, (x, y, z) in enumerate(members):
        area += _add_stair(stairs, x, y)
        above = members[number + 1][2] if number + 1 < len(members) else 1.0
        volume += area * (above - z)
    return volume


def spread(
    candidates: Sequence[Objectives], count: int, taken: Sequence[Objectives] = ()
) -> list[int]:
    """Return the places of at most `count` candidates that together dominate most, best first.

    Greedily: each adds the most to those before it and to `taken` (within 1 - 1/e of the best set,
    since hypervolume is submodular; Nemhauser et al. 1978). Candidates that add nothing are left
    out.
    """
    chosen: list[int] = []
    have = list(taken)
    total = hypervolume(have)
    # A gain only falls while others are chosen, so an old one is an upper bound (Minoux 1978).
    bounds = {place: math.inf for place in range(len(candidates))}
    while bounds and len(chosen) < count:
        best, best_gain = -1, 0.0
        for place in sorted(bounds, key=lambda each: (-bounds[each], each)):
            if bounds[place] <= best_gain:
                break
            bounds[place] = hypervolume([*have, candidates[place]]) - total
            if bounds[place] > best_gain:
                best, best_gain = place, bounds[place]
        if best_gain <= 1e-12:
            break
        chosen.append(best)
        have.append(candidates[best])
        total += best_gain
        del bounds[best]
    return chosen


def _objectives(point: Point, *, has_latency: bool) -> Objectives:
    pair = (point.perplexity_increase, point.size_ratio)
    if has_latency and point.latency_ratio is not None:
        return (*pair, point.latency_ratio)
    return pair


def _dominates(one: Objectives, other: Objectives) -> bool:
    no_worse = all(a <= b for a, b in zip(one, other, strict=True))
    return no_worse and one != other


def _padded(point: Objectives) -> tuple[float, float, float]:
    x, y, z = (*(max(0.0, value) for value in point), 0.0, 0.0)[:3]
    return x, y, z


def _add_stair(stairs: list[tuple[float, float]], x: float, y: float) -> float:
    """Add a point to a staircase, x rising and y falling; return the area it adds in the square."""
    first = bisect.bisect_left(stairs, (x, y))
    top = stairs[first - 1][1] if first else 1.0
    if y >= top:
        return 0.0
    area, left, last = 0.0, x, first
    while last < len(stairs) and stairs[last][1] >= y:
        area += (stairs[last][0] - left) * (top - y)
        left, top = stairs[last]
        last += 1
    right = stairs[last][0] if last < len(stairs) else 1.0
    area += (right - left) * (top - y)
    stairs[first:last] = [(x, y)]
    return area
