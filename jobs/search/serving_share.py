"""What a request will take through Ray Serve, by the kernels' table and all other models served.

Takes times that the table predicts and times that were served beside the unchanged model's; gives
the time to expect of one more. Pure.

A served request takes k * (t + c): t is what the table says of its model, c what Serve, the gateway
and the engine add whatever the model is, and k how much slower the machine is than when the table
was made. The unchanged model, asked in turn with every other, gives k (t_base + c); models of
other speed tell c from k by least squares, served / base * (t_base + c) = t + c, with the c that
k = 1 gives for a prior. A c below 0 counts as 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_PRIOR = 0.05  # Its weight: that of one model whose request takes 0.78 of the unchanged one's.


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
    found, weight = _PRIOR * (base_served_ms - base_table_ms), _PRIOR
    for other in others:
        ratio = other.served_ms / other.base_served_ms
        found += (1.0 - ratio) * (ratio * base_table_ms - other.table_ms)
        weight += (1.0 - ratio) ** 2
    added_ms = max(0.0, found / weight)
    return base_served_ms * (table_ms + added_ms) / (base_table_ms + added_ms)
