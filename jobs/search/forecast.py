"""What an assignment will come to, before it is tried: bytes, memory, latency, cost and quality.

Takes a space, the kernels' times and a predictor; gives values and how they meet the limits. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError
from jobs.evaluation.kernel_times import PRODUCTS, KernelTimes, spell
from jobs.search.pareto import Point, shares
from jobs.search.predictor import Predictor
from jobs.search.space import Assignment, Space, layout_of

_PRODUCTS_OF_PART = {"self_attn": ("qkv", "o"), "mlp": ("gate_up", "down")}
_NAMES = {
    "max_perplexity_increase": "perplexity increase",
    "max_size_ratio": "size, over bf16",
    "max_bytes": "bytes",
    "max_memory_bytes": "bytes in memory",
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
        return self.times.uniform_ms["bf16/None"]

    def latency_ms(self, assignment: Assignment) -> float:
        """Return the milliseconds of a request."""
        if not assignment:
            return self.base_ms
        chosen = self.latency_SC[np.arange(len(assignment)), list(assignment)]
        return self.times.rest_ms + float(chosen.sum())

    def point(self, number: int, assignment: Assignment, rise: float | None = None) -> Point:
        """Return an assignment's objectives, with a measured rise of the loss or the predicted."""
        rise = self.predictor.rise(assignment) if rise is None else rise
        return Point(
            candidate=number,
            perplexity_increase=math.expm1(min(rise, 50.0)),
            size_ratio=self.space.size_bytes(assignment) / self.space.base_bytes,
            latency_ratio=self.latency_ms(assignment) / self.base_ms,
        )

    def objectives(self, assignment: Assignment, rise: float | None = None) -> tuple[float, ...]:
        """Return the same as shares of the worst that counts."""
        return shares(self.point(0, assignment, rise), self.space.config.gate)

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
        latency_ms, config = self.latency_ms(assignment), self.space.config
        size_bytes = self.space.size_bytes(assignment)
        values = {
            "max_size_ratio": size_bytes / self.space.base_bytes,
            "max_bytes": float(size_bytes),
            "max_memory_bytes": float(self.space.memory_bytes(assignment)),
            "max_latency_ms": latency_ms,
        }
        cost = config.limits.cost_per_million_tokens(latency_ms, config.workload.output_tokens)
        if cost is not None:
            values["max_cost_per_million_tokens"] = cost
        return values


def limits_of(space: Space) -> dict[str, float]:
    """Return every limit that is set, by name."""
    config = space.config
    limits: dict[str, float | None] = {
        "max_perplexity_increase": config.gate.max_perplexity_increase,
        "max_size_ratio": config.gate.max_size_ratio,
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


def check_limits(forecast: Forecast, assignments: Sequence[Assignment]) -> None:
    """Raise ConfigError where none of these assignments, a front, keeps to the limits.

    Quality is left to the gate: what is predicted of it is too rough to refuse a search. The
    message names the limits that leave nothing, and the assignment that is nearest.
    """
    every = {each: forecast.excesses(each) for each in assignments}
    if not every or any(not excess for excess in every.values()):
        return
    nearest = min(every, key=lambda each: (sum(every[each].values()), each))
    guilty = emptying(list(every.values()))
    limits, values = limits_of(forecast.space), forecast.values(nearest)
    met = ", ".join(
        f"{_NAMES[name]} {values[name]:,.4g} (limit {limits[name]:,.4g})" for name in every[nearest]
    )
    raise ConfigError(
        f"no model of this search can keep to all limits: {explain(guilty)}. The nearest is "
        f"`{forecast.space.describe(nearest)}` with {met}. Raise "
        f"{' or '.join(f'`{name}`' for name in guilty or every[nearest])}, or add smaller or "
        "faster `schemes`."
    )


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


def _latency(space: Space, times: KernelTimes) -> NDArray[np.float64]:
    """Return the milliseconds of a request that each choice of each group takes: [S, C]."""
    found = np.zeros((len(space.groups), len(space.choices)))
    for s, group in enumerate(space.groups):
        products = _PRODUCTS_OF_PART.get(group.part, (group.part,))
        assert all(product in PRODUCTS for product in products), f"no product {products}"
        for c, choice in enumerate(space.choices):
            table = times.product_ms[spell(layout_of(choice.scheme, space.decoder))]
            block_ms = sum(table[product] for product in products)
            found[s, c] = (group.stop - group.first) * block_ms
    return found
