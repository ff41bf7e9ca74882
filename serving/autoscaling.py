"""How many replicas a version needs: decided by tokens in flight and queue age, not by requests.

Takes what replicas say of their load; gives a number. `decide` is pure; `Policy` is how Ray Serve
calls it. It does not know how replicas are started.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.config import ReplicaScaling

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TOKENS_IN_FLIGHT, QUEUE_AGE = "tokens_in_flight", "queue_age_s"
# Fewer replicas have to be this far from full: a load near a boundary does not go back and forth.
_DOWNSCALE_FILL = 0.7


@dataclass(frozen=True)
class Load:
    """What all replicas of a version have to do.

    `num_asleep`: requests that wait for a first one. `num_starting`: replicas that were asked for
    and do not run yet.
    """

    tokens_in_flight: float = 0.0
    queue_age_s: float = 0.0
    num_asleep: float = 0.0
    num_starting: int = 0


@dataclass(frozen=True)
class Since:
    """Since when more, or fewer, replicas are needed; None: they are not."""

    above_s: float | None = None
    below_s: float | None = None


def decide(
    load: Load, num_replicas: int, scaling: ReplicaScaling, since: Since, now_s: float
) -> tuple[int, Since]:
    """Return how many replicas there shall be, and what to pass to the next decision."""
    if num_replicas == 0 and load.num_asleep:
        return max(1, scaling.min_replicas), Since()
    if num_replicas < scaling.min_replicas:
        return scaling.min_replicas, Since()
    more = _bounded(_needed(load, num_replicas, scaling, fill=1.0), scaling)
    fewer = _bounded(_needed(load, num_replicas, scaling, fill=_DOWNSCALE_FILL), scaling)
    if more > num_replicas:
        above_s = now_s if since.above_s is None else since.above_s
        is_due = now_s - above_s >= scaling.upscale_delay_s
        return (more, Since()) if is_due else (num_replicas, Since(above_s=above_s))
    if fewer < num_replicas:
        below_s = now_s if since.below_s is None else since.below_s
        # The last one goes by itself and later: starting the first takes longest.
        target = max(fewer, 1) if num_replicas > 1 else fewer
        delay_s = scaling.to_zero_delay_s if target == 0 else scaling.downscale_delay_s
        is_due = now_s - below_s >= delay_s
        return (target, Since()) if is_due else (num_replicas, Since(below_s=below_s))
    return num_replicas, Since()


def _needed(load: Load, num_replicas: int, scaling: ReplicaScaling, fill: float) -> int:
    needed = math.ceil(load.tokens_in_flight / (scaling.target_tokens * fill))
    if load.queue_age_s > scaling.max_queue_age_s:
        # What waits goes on waiting while a replica loads its model: one at a time.
        return max(needed, num_replicas if load.num_starting else num_replicas + 1)
    return max(needed, 1) if load.num_asleep else needed


def _bounded(needed: int, scaling: ReplicaScaling) -> int:
    return min(max(needed, scaling.min_replicas), scaling.max_replicas)


class Policy:
    """What Ray Serve's controller calls about every tenth of a second."""

    def __init__(self, **scaling: Any) -> None:
        self._scaling = ReplicaScaling(**scaling)

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """Return the number of replicas and the state to be called with next time."""
        state = context.policy_state or {}
        since = Since(state.get("above_s"), state.get("below_s"))
        number, since = decide(
            _load(context),
            context.target_num_replicas,
            self._scaling,
            since,
            context.current_time or 0.0,
        )
        return number, asdict(since)


def _load(context: "AutoscalingContext") -> Load:
    metrics = context.raw_metrics or {}
    return Load(
        sum(_latest(metrics.get(TOKENS_IN_FLIGHT, {}))),
        max(_latest(metrics.get(QUEUE_AGE, {})), default=0.0),
        context.total_num_requests,
        max(0, context.target_num_replicas - context.current_num_replicas),
    )


def _latest(by_replica: Mapping[Any, Any]) -> list[float]:
    """Return the last value that each replica reported."""
    return [series[-1].value for series in by_replica.values() if series]
