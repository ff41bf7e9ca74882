"""What a request will take through Ray Serve, by the kernels' table and other models served so far.

Takes times that the table predicts and times that were served beside the unchanged model's; gives
the time to expect of one more. Pure.

A served request takes k * (t + c): t is what the table says of its model, c what Serve, the gateway
and the engine add whatever the model is, and k how much slower the machine is than when the table
was made. The unchanged model, asked in turn with every other, gives k; models of other speed give
c, by least squares: served / base * (t_base + c) = t + c.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """Milliseconds of requests to one model: by the table, and as served beside the unchanged."""

    table_ms: float
    served_ms: float
    base_served_ms: float


def expected_ms(
    table_ms: float, base_table_ms: float, base_served_ms: float, others: Sequence[Served]
) -> float:
    """Return the milliseconds to expect of a model, from what others took and not from itself.

    Without others, all that the unchanged model takes beyond the table is taken for Serve's.
    """
    added_ms = _added_ms(base_table_ms, others)
    if added_ms is None:
        return table_ms + base_served_ms - base_table_ms
    return base_served_ms * (table_ms + added_ms) / (base_table_ms + added_ms)


def _added_ms(base_table_ms: float, others: Sequence[Served]) -> float | None:
    """Return c of the others; None if they say nothing of it, being as slow as the unchanged."""
    ratios = [each.served_ms / each.base_served_ms for each in others]
    weight = sum((1.0 - ratio) ** 2 for ratio in ratios)
    if weight < _LEAST_WEIGHT:
        return None
    found = sum(
        (1.0 - ratio) * (ratio * base_table_ms - each.table_ms)
        for ratio, each in zip(ratios, others, strict=True)
    )
    return max(0.0, found / weight)


_LEAST_WEIGHT = 0.01  # One model that is served a tenth faster than the unchanged one.
