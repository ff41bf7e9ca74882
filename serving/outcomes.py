"""How requests to a version ended, and how fast: counts that add up.

Takes what happened to single requests; gives counts and quantiles. Times are counted in buckets
that grow by a tenth, so that any quantile is known to within that, whatever the load was.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

_FIRST_S, _GROWTH, _NUM_BUCKETS = 1e-4, 1.1, 160  # 0.1 ms to 7 minutes.


@dataclass
class Outcomes:
    """Counts of one version at one gateway since it started."""

    num_requests: int = 0
    num_failed: int = 0
    num_resumed: int = 0
    first_token: dict[int, int] = field(default_factory=dict)
    between_tokens: dict[int, int] = field(default_factory=dict)

    def ended(self, *, is_failed: bool) -> None:
        """Count one request; failed means refused, whoever's fault it was.

        A version that refuses what the other one answers is worse than it, and mistakes of clients
        meet both alike.
        """
        self.num_requests += 1
        self.num_failed += is_failed

    def add_first_token(self, after_s: float) -> None:
        """Count the time to one first token."""
        _count(self.first_token, after_s)

    def add_between_tokens(self, mean_s: float) -> None:
        """Count one request's mean time between tokens."""
        _count(self.between_tokens, mean_s)

    def since(self, before: "Outcomes") -> "Outcomes":
        """Return what was added to an earlier state of this."""
        return Outcomes(
            self.num_requests - before.num_requests,
            self.num_failed - before.num_failed,
            self.num_resumed - before.num_resumed,
            _difference(self.first_token, before.first_token),
            _difference(self.between_tokens, before.between_tokens),
        )


def total(parts: Iterable[Outcomes]) -> Outcomes:
    """Return the sum of several gateways' counts."""
    result = Outcomes()
    for part in parts:
        result.num_requests += part.num_requests
        result.num_failed += part.num_failed
        result.num_resumed += part.num_resumed
        for buckets, more in (
            (result.first_token, part.first_token),
            (result.between_tokens, part.between_tokens),
        ):
            for at, count in more.items():
                buckets[at] = buckets.get(at, 0) + count
    return result


def quantile_s(buckets: dict[int, int], share: float) -> float | None:
    """Return the time that `share` of the counted ones did not exceed; None without any."""
    rank = math.ceil(share * sum(buckets.values()))
    seen = 0
    for at in sorted(buckets):
        seen += buckets[at]
        if seen >= rank:
            return _FIRST_S * math.pow(_GROWTH, at)
    return None


def count_above(buckets: dict[int, int], seconds: float) -> int:
    """Return how many of the counted ones surely took longer."""
    limit = _bucket(seconds)
    return sum(count for at, count in buckets.items() if at > limit)


def _bucket(seconds: float) -> int:
    if seconds <= _FIRST_S:
        return 0
    return min(math.ceil(math.log(seconds / _FIRST_S, _GROWTH)), _NUM_BUCKETS)


def _difference(now: dict[int, int], before: dict[int, int]) -> dict[int, int]:
    return {at: count - before.get(at, 0) for at, count in now.items() if count > before.get(at, 0)}


def _count(buckets: dict[int, int], seconds: float) -> None:
    at = _bucket(seconds)
    buckets[at] = buckets.get(at, 0) + 1
