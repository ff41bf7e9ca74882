"""What an assignment will come to, before it is tried: bytes, memory, latency, cost and quality.

Takes a space, the kernels' times and a predictor; gives values and how they meet the limits. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from jobs.evaluation.kernel_times import KernelTimes, spell
from jobs.search.knapsack import priced
from jobs.search.pareto import Point, shares
from jobs.search.predictor import Predictor
from jobs.search.space import Assignment, Space, layout_of
from jobs.search.tasks import Result

_NAMES = {
    "max_perplexity_increase": "perplexity increase",
    "max_size_ratio": "size, over bf16",
    "max_bytes": "bytes",
    "max_memory_bytes": "bytes in memory",
    "max_latency_ratio": "latency, over bf16",
    "max_latency_ms": "milliseconds a request",
    "max_cost_per_million_tokens": "cost of a million tokens",
}


@dataclass(frozen=True)
class Forecast:
    """A space with what its choices take."""

    space: Space
    times: KernelTimes
    predictor: Predictor
    latency_SC: NDArray[np.float64]  # noqa: N815

    @classmethod
    def of(cls, space: Space, times: KernelTimes, predictor: Predictor) -> "Forecast":
        """Return a forecast of a space's assignments."""
        return cls(space, times, predictor, _latency(space, times))

    def with_predictor(self, predictor: Predictor) -> "Forecast":
        """Return the same with another opinion on quality."""
        return Forecast(self.space, self.times, predictor, self.latency_SC)

    @property
    def base_ms(self) -> float:
        """Milliseconds of a request on the unchanged model."""
        return self.times.base_ms

    def latency_ms(self, assignment: Assignment) -> float:
        """Return the milliseconds of a request."""
        if not assignment:
            return self.base_ms
        chosen = self.latency_SC[np.arange(len(assignment)), list(assignment)]
        return self.times.rest_ms + float(chosen.sum())

    def point(self, assignment: Assignment, rise: float | None = None) -> Point:
        """Return an assignment's objectives, with a measured rise of the loss or the predicted."""
        rise = self.predictor.rise(assignment) if rise is None else rise
        return Point(
            perplexity_increase=math.expm1(min(rise, 50.0)),
            size_ratio=self.space.size_bytes(assignment) / self.space.base_bytes,
            latency_ratio=self.latency_ms(assignment) / self.base_ms,
        )

    def objectives(self, assignment: Assignment, rise: float | None = None) -> tuple[float, ...]:
        """Return the same as shares of the worst that counts."""
        return shares(self.point(assignment, rise), self.space.config.gate)

    def excesses(
        self, assignment: Assignment, perplexity_increase: float | None = None
    ) -> dict[str, float]:
        """Return by how much each limit is exceeded, over the limit, by the limit's name."""
        values = self.values(assignment)
        if perplexity_increase is not None:
            values["max_perplexity_increase"] = perplexity_increase
        return excesses(values, limits_of(self.space))

    def values(self, assignment: Assignment) -> dict[str, float]:
        """Return what the limits are compared with, but for quality."""
        return _values(
            self.space,
            size_bytes=self.space.size_bytes(assignment),
            memory_bytes=self.space.memory_bytes(assignment),
            latency_ms=self.latency_ms(assignment),
            base_ms=self.base_ms,
        )


def measured_values(space: Space, found: Result, request: Result) -> dict[str, float]:
    """Return what the limits are compared with, but for quality, as it was measured.

    What could not be measured is infinite.
    """
    return _values(
        space,
        size_bytes=found.size_bytes,
        memory_bytes=math.inf if found.memory_bytes is None else found.memory_bytes,
        latency_ms=math.inf if request.request_ms is None else request.request_ms,
        base_ms=request.base_request_ms or math.nan,
    )


def name_of(limit: str) -> str:
    """Return what a limit is for, in words."""
    return _NAMES[limit]


def limits_of(space: Space) -> dict[str, float]:
    """Return every limit that is set, by name."""
    config = space.config
    limits: dict[str, float | None] = {
        "max_perplexity_increase": config.gate.max_perplexity_increase,
        "max_size_ratio": config.gate.max_size_ratio,
        "max_latency_ratio": config.gate.max_latency_ratio,
        "max_bytes": config.limits.max_bytes,
        "max_memory_bytes": config.limits.max_memory_bytes,
        "max_latency_ms": config.limits.max_latency_ms,
        "max_cost_per_million_tokens": config.limits.max_cost_per_million_tokens,
    }
    return {name: float(limit) for name, limit in limits.items() if limit is not None}


def excesses(values: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each value is beyond its limit, over the limit; those within are left out.

    What is not a finite number is infinitely far beyond.
    """
    found = {}
    for name in limits.keys() & values.keys():
        value = values[name]
        excess = value / limits[name] - 1.0 if math.isfinite(value) else math.inf
        if excess > 0:
            found[name] = excess
    return dict(sorted(found.items()))


def check_limits(forecast: Forecast) -> None:
    """Raise ConfigError where no assignment that can be found keeps to the limits.

    Quality is left to the gate: what is predicted of it is too rough to refuse a search. The
    message names the limits that leave nothing, and the assignment that is nearest.
    """
    space = forecast.space
    pool = [*knapsack_front(forecast), *uniform_assignments(space)]
    every = {each: forecast.excesses(each) for each in pool}
    nearest = _descend(forecast, min(every, key=lambda each: (sum(every[each].values()), each)))
    excess = forecast.excesses(nearest)
    if not excess:
        return
    guilty = emptying([*every.values(), excess])
    limits, values = limits_of(space), forecast.values(nearest)
    met = ", ".join(f"{_NAMES[n]} {values[n]:,.4g} (limit {limits[n]:,.4g})" for n in excess)
    raise ConfigError(
        f"no model of this search can keep to all limits: {explain(guilty)}. The nearest is "
        f"`{space.describe(nearest)}` with {met}. Raise "
        f"{' or '.join(f'`{name}`' for name in guilty or excess)}, or add smaller or "
        "faster `schemes`."
    )


def knapsack_front(forecast: Forecast) -> list[Assignment]:
    """Return the convex fronts of loss, bytes and latency as they are predicted now."""
    space = forecast.space
    size_SC = -space.saved_bytes_SC.astype(float)
    fronts = priced(forecast.predictor.rises_SC, size_SC, forecast.latency_SC)
    return [each for each in fronts if space.changes(each)]


def uniform_assignments(space: Space) -> list[Assignment]:
    """Return one choice everywhere, for every choice that changes something."""
    return [space.uniform(c) for c, choice in enumerate(space.choices) if not choice.is_nothing]


def _descend(forecast: Forecast, assignment: Assignment) -> Assignment:
    """Change one group at a time for as long as that brings the limits nearer."""
    least = sum(forecast.excesses(assignment).values())
    while least > 0:
        changed = [
            (*assignment[:group], choice, *assignment[group + 1 :])
            for group in range(len(assignment))
            for choice in range(len(forecast.space.choices))
        ]
        sums = [sum(forecast.excesses(each).values()) for each in changed]
        best = min(range(len(changed)), key=sums.__getitem__)
        if sums[best] >= least:
            break
        assignment, least = changed[best], sums[best]
    return assignment


def emptying(every: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the limits without any one of which some model would be left; none if it takes two."""
    names = sorted({name for excess in every for name in excess})
    return [name for name in names if any(set(excess) <= {name} for excess in every)]


def explain(guilty: Sequence[str]) -> str:
    """Return which limits leave nothing, in words."""
    if not guilty:
        return "several limits together leave nothing, and none alone is the cause"
    if len(guilty) == 1:
        return f"`{guilty[0]}` leaves nothing of what the others allow"
    names = " and ".join(f"`{name}`" for name in guilty)
    return f"{names} contradict each other: either alone could be kept"


def _values(
    space: Space, *, size_bytes: float, memory_bytes: float, latency_ms: float, base_ms: float
) -> dict[str, float]:
    config = space.config
    values = {
        "max_size_ratio": size_bytes / space.base_bytes,
        "max_latency_ratio": latency_ms / base_ms,
        "max_bytes": float(size_bytes),
        "max_memory_bytes": float(memory_bytes),
        "max_latency_ms": latency_ms,
    }
    cost = config.limits.cost_per_million_tokens(latency_ms, config.workload.output_tokens)
    if cost is not None:
        values["max_cost_per_million_tokens"] = cost
    return values


def _latency(space: Space, times: KernelTimes) -> NDArray[np.float64]:
    """Return the milliseconds of a request that each choice of each group takes: [S, C]."""
    found = np.zeros((len(space.groups), len(space.choices)))
    for s, group in enumerate(space.groups):
        for c, choice in enumerate(space.choices):
            table = times.product_ms[spell(layout_of(choice.scheme, space.decoder))]
            block_ms = sum(table[product] for product in group.products)
            found[s, c] = (group.stop - group.first) * block_ms
    return found
