"""Whether a new version takes over: decided from what was observed, step by step.

Takes limits and observations; gives the next state and the reason. Pure: `serving.promote` carries
decisions out. It does not know Ray, HTTP or the registry.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from pydantic import Field

from cluster.config import StrictModel
from jobs.config import MIN_PARITY
from serving.directory import EXPIRY_S
from serving.outcomes import Outcomes, count_above, quantile_s

_ONE_SIDED_95 = 1.645
_TAIL = 0.05  # Latency is judged by the 95th percentile.
# Differences below these are nothing that a reader of a stream would notice, whatever the ratio.
_FIRST_TOKEN_NOISE_S, _BETWEEN_TOKENS_NOISE_S = 0.02, 0.005


class RolloutState(StrEnum):
    """Where a rollout is."""

    CHECKING = "checking"
    CANARY = "canary"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing more happens."""
        return self in (RolloutState.PROMOTED, RolloutState.ROLLED_BACK)


class RolloutLimits(StrictModel):
    """What a new version must show before it gets every request."""

    canary_ratio: float = Field(
        default=0.1, gt=0, lt=1, description="Share of the name's requests that it gets at first."
    )
    watch_s: float = Field(default=60.0, ge=0, description="How long it is watched at least.")
    min_requests: int = Field(
        default=50, ge=1, description="Requests of clients it must have answered."
    )
    max_wait_s: float = Field(
        default=900.0, gt=0, description="Rolled back if there were not enough requests until then."
    )
    min_parity: float = Field(
        default=MIN_PARITY,
        ge=0,
        le=1,
        description="Share of prompts it answers as it does offline.",
    )
    max_error_increase: float = Field(
        default=0.01, ge=0, description="Failed requests, as a share, above the old version's."
    )
    max_latency_ratio: float = Field(
        default=1.5, ge=1, description="95th percentile of its times over the old version's."
    )
    max_disagreement: float = Field(
        default=0.5, ge=0, le=1, description="Share of prompts it answers unlike the old version."
    )
    min_compared: int = Field(default=8, ge=0, description="Prompts both must have answered.")


class PromoteConfig(StrictModel):
    """The rollout of one version."""

    model: str = Field(description="name@version that shall answer for the name.")
    registry: str = Field(default="runs/registry", description="Folder of the registry.")
    application: str = Field(default="gateway", description="Serve application of the gateway.")
    prompts: str | None = Field(
        default=None, description="File with a prompt a line; unset: some that are built in."
    )
    max_tokens: int = Field(default=16, ge=1, description="Tokens of each compared answer.")
    ready_timeout_s: float = Field(default=300.0, gt=0, description="For the version to come up.")
    limits: RolloutLimits = Field(default=RolloutLimits(), description="What it must show.")


@dataclass(frozen=True)
class Observation:
    """What was seen since the rollout began, or since the canary did.

    `parity` is a share of prompts, None before it was measured, and if it is not compared with
    what its model says offline. Shares of failures and times are of
    the time since the canary got requests. `absent_s` is for how long the directory has named no
    replica of the version, None where it names one now.
    """

    elapsed_s: float = 0.0
    parity: float | None = None
    is_compared: bool = True
    absent_s: float | None = None
    canary: Outcomes = field(default_factory=Outcomes)
    baseline: Outcomes = field(default_factory=Outcomes)
    num_compared: int = 0
    num_disagreeing: int = 0


class Absence:
    """For how long a version has had no replica, over looks at the directory."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def look(self, num_replicas: int, now_s: float) -> float | None:
        """Return `Observation.absent_s` after one more look."""
        if num_replicas > 0:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s


@dataclass(frozen=True)
class Decision:
    """The state from now on, and why."""

    state: RolloutState
    reason: str


def decide(state: RolloutState, seen: Observation, limits: RolloutLimits) -> Decision:
    """Return what follows from an observation; a terminal state stays."""
    if state.is_terminal:
        return Decision(state, "it has ended")
    # A directory that has just started knows nobody yet: one look at it is no proof.
    if seen.absent_s is not None and seen.absent_s > EXPIRY_S:
        return Decision(RolloutState.ROLLED_BACK, "the new version has no replica left")
    if state is RolloutState.CHECKING:
        return _after_check(seen, limits)
    if (problem := _problem(seen, limits)) is not None:
        return Decision(RolloutState.ROLLED_BACK, problem)
    return _after_watch(seen, limits)


def _after_check(seen: Observation, limits: RolloutLimits) -> Decision:
    if not seen.is_compared:
        return Decision(RolloutState.CANARY, "it is not compared with what its model says offline")
    if seen.parity is None:
        return Decision(RolloutState.CHECKING, "parity was not measured yet")
    found = f"{seen.parity:.0%} of the prompts are answered as offline"
    if seen.parity < limits.min_parity:
        least = f"at least {limits.min_parity:.0%} have to be"
        return Decision(RolloutState.ROLLED_BACK, f"{found}; {least}")
    return Decision(RolloutState.CANARY, found)


def _after_watch(seen: Observation, limits: RolloutLimits) -> Decision:
    missing = []
    if seen.absent_s is not None:
        missing.append("a replica")
    if seen.elapsed_s < limits.watch_s:
        missing.append(f"{limits.watch_s - seen.elapsed_s:.0f} s")
    if seen.canary.num_requests < limits.min_requests:
        missing.append(f"{limits.min_requests - seen.canary.num_requests} requests")
    if seen.num_compared < limits.min_compared:
        missing.append(f"{limits.min_compared - seen.num_compared} compared prompts")
    if not missing:
        reason = f"{seen.canary.num_requests} requests within the limits"
        return Decision(RolloutState.PROMOTED, reason)
    left = " and ".join(missing)
    if seen.elapsed_s >= limits.max_wait_s:
        reason = f"after {limits.max_wait_s:.0f} s it still lacks {left}"
        return Decision(RolloutState.ROLLED_BACK, reason)
    return Decision(RolloutState.CANARY, f"watching: {left} to go")


def _problem(seen: Observation, limits: RolloutLimits) -> str | None:
    """Return the limit that is exceeded beyond chance, or None."""
    canary, baseline = seen.canary, seen.baseline
    usual = baseline.num_failed / max(baseline.num_requests, 1)
    if at_least(canary.num_failed, canary.num_requests) > usual + limits.max_error_increase:
        failed = f"{canary.num_failed} of {canary.num_requests} requests failed"
        return f"{failed}, and {usual:.1%} of the old version's"
    if at_least(seen.num_disagreeing, seen.num_compared) > limits.max_disagreement:
        return (
            f"{seen.num_disagreeing} of {seen.num_compared} prompts are answered unlike the old "
            f"version; at most {limits.max_disagreement:.0%} may be"
        )
    ratio = limits.max_latency_ratio
    return _slower(
        "first token", canary.first_token, baseline.first_token, ratio, _FIRST_TOKEN_NOISE_S
    ) or _slower(
        "time between tokens",
        canary.between_tokens,
        baseline.between_tokens,
        ratio,
        _BETWEEN_TOKENS_NOISE_S,
    )


def _slower(
    what: str, canary: dict[int, int], baseline: dict[int, int], ratio: float, noise_s: float
) -> str | None:
    """Return how much slower the canary's tail is, if it is beyond chance.

    Were its 95th percentile within the limit, one in twenty of its times would exceed that.
    """
    usual_s = quantile_s(baseline, 1 - _TAIL)
    if usual_s is None or sum(baseline.values()) * _TAIL < 1:
        return None
    limit_s = max(usual_s * ratio, usual_s + noise_s)
    num_slow, count = count_above(canary, limit_s), sum(canary.values())
    if at_least(num_slow, count) <= _TAIL:
        return None
    return (
        f"{what}: {num_slow} of {count} took over {1e3 * limit_s:.0f} ms; the old version's 95th "
        f"percentile is {1e3 * usual_s:.0f} ms"
    )


def at_least(hits: int, count: int) -> float:
    """Return the share that is exceeded with 95 % confidence (Wilson 1927); 0 without any hit."""
    if hits == 0:
        return 0.0
    share, z2 = hits / count, _ONE_SIDED_95**2
    spread = _ONE_SIDED_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return (share + z2 / (2 * count) - spread) / (1 + z2 / count)
