"""Which assignments are tried next, in generations: the first from what choices do alone.

Takes a forecast and what was scored so far; gives assignments. Pure: equal results and seed give
equal proposals, so a search that goes on after a kill proposes what it would have.
"""

import random
from collections.abc import Mapping, Sequence

from jobs.search.forecast import Forecast, knapsack_front, uniform_assignments
from jobs.search.knapsack import neighbours
from jobs.search.pareto import spread, violation
from jobs.search.space import Assignment

_NEIGHBOURS = 400


def propose(
    forecast: Forecast, count: int, scored: Mapping[Assignment, float], generation: int
) -> list[Assignment]:
    """Return at most `count` assignments that are not in `scored` (rises of the loss, measured).

    The first generation begins with every uniform assignment. Then come those that together are
    predicted to dominate most beside what was scored: of fronts of the knapsack under the present
    predictor, and of changes of their and the scored ones' members. Where fewer are predicted to
    be within the limits, the nearest fill up. Fewer come back if the space is smaller.
    """
    space = forecast.space
    first = uniform_assignments(space) if generation == 0 else []
    first = [each for each in first if each not in scored][:count]
    pool = _pool(forecast, scored, generation)
    pool = [each for each in pool if each not in scored and each not in first]
    have = [forecast.objectives(each, rise) for each, rise in scored.items()]
    have += [forecast.objectives(each) for each in first]
    places = spread([forecast.objectives(each) for each in pool], count - len(first), have)
    chosen = [*first, *(pool[place] for place in places)]
    return [*chosen, *_nearest(forecast, pool, chosen, count - len(chosen))]


def _pool(
    forecast: Forecast, scored: Mapping[Assignment, float], generation: int
) -> list[Assignment]:
    space = forecast.space
    generator = random.Random(f"{space.config.seed}/{generation}")
    fronts = knapsack_front(forecast)
    measured = [each for each in scored if each]
    good = spread([forecast.objectives(each, scored[each]) for each in measured], len(measured))
    parents = [*fronts, *(measured[place] for place in good)]
    changed = neighbours(parents, len(space.choices), _NEIGHBOURS, generator)
    return list(dict.fromkeys([*fronts, *filter(space.changes, changed)]))


def _nearest(
    forecast: Forecast, pool: Sequence[Assignment], chosen: Sequence[Assignment], count: int
) -> list[Assignment]:
    if count <= 0:
        return []
    limits = forecast.space.config.gate
    left = [each for each in pool if each not in set(chosen)]
    return sorted(left, key=lambda each: (violation(forecast.point(each), limits), each))[:count]
