"""The gate a compressed model passes before it may be published.

Takes what was measured and the limits; gives a verdict with every reason for a refusal. Pure: it
does not know how anything was measured or what happens to a refused model.
"""

import math
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cluster.config import StrictModel
from cluster.errors import GateRefusedError
from jobs.config import GateConfig
from jobs.evaluation.intervals import Interval, perplexity_increase

_NAMED_FAULTS = 3
# Two timings of one model differ by this much, bounds and all: 24 of 24 pairs stayed below.
_SAME_SPEED = 1.02


class Checks(StrictModel):
    """What is measured of a model beside its losses and its size; what is None was not.

    `latency_change` is the interval of paired latency ratios, `agreement` that of the share of
    greedy choices equal to the base's.
    """

    latency_ms: float | None = None
    base_latency_ms: float | None = None
    latency_change: Interval | None = None
    agreement: Interval | None = None
    agreement_prompts: int = 0


class Measurement(Checks):
    """A compressed model beside the bf16 model it came from; `faults` are sentences."""

    perplexity_increase: Interval
    base_perplexity: float
    perplexity: float
    num_sequences: int
    size_bytes: int
    base_size_bytes: int
    faults: tuple[str, ...] = ()
    num_judged: int = 1

    @classmethod
    def from_losses(
        cls,
        base_losses: NDArray[np.float64],
        losses: NDArray[np.float64],
        limits: GateConfig,
        *,
        num_judged: int = 1,
        **measured: Any,
    ) -> Self:
        """Return a measurement from two models' losses, in nats per token, of equal sequences.

        `measured` are the other fields: sizes, latencies and the rest. Of `num_judged` models one
        may be taken: then the bounds of the perplexity increase hold for all at once.
        """
        return cls(
            perplexity_increase=perplexity_increase(
                base_losses,
                losses,
                samples=limits.bootstrap_samples,
                seed=limits.seed,
                num_judged=num_judged,
            ),
            num_judged=num_judged,
            base_perplexity=float(np.exp(base_losses.mean())),
            perplexity=float(np.exp(losses.mean())),
            num_sequences=len(losses),
            **measured,
        )

    @property
    def size_ratio(self) -> float:
        """Bytes of the weights on disk over the bf16 model's."""
        return self.size_bytes / self.base_size_bytes if self.base_size_bytes else math.nan

    @property
    def latency_ratio(self) -> float | None:
        """Decode latency over the bf16 model's; None if it was not measured."""
        if self.latency_ms is None or self.base_latency_ms is None:
            return None
        return self.latency_ms / self.base_latency_ms if self.base_latency_ms else math.nan


class Verdict(StrictModel):
    """Whether a model may be published, why not, and the numbers it was judged by.

    With all limits and seeds, and what was measured on, so that it can be measured again.
    """

    passed: bool
    reasons: tuple[str, ...] = ()
    numbers: dict[str, float | int | None] = Field(default_factory=dict)
    limits: GateConfig | None = None
    measured_on: dict[str, str | int] = Field(default_factory=dict)


class Judged(StrictModel):
    """A model beside the one it came from, and the verdict."""

    model: Path
    base: Path
    verdict: Verdict

    def summary(self) -> dict[str, Any]:
        """Return the values to print."""
        return {
            "model": str(self.model),
            "base": str(self.base),
            "passed": self.verdict.passed,
            "reasons": "; ".join(self.verdict.reasons),
            **self.measured(),
            **self.verdict.numbers,
        }

    def measured(self) -> dict[str, Any]:
        """Return what was measured beside the numbers of the verdict."""
        return {}


def judge(measurement: Measurement, limits: GateConfig) -> Verdict:
    """Judge a measurement; every broken limit is one reason.

    A number that is not finite, or too few sequences, is a refusal: what was not measured is not
    good. A model that is broken, or not smaller than its origin, is refused whatever the limits.
    """
    reasons = [
        *_fault_reasons(measurement),
        *_quality_reasons(measurement, limits),
        *_size_reasons(measurement, limits),
        *_agreement_reasons(measurement, limits),
        *_latency_reasons(measurement, limits),
    ]
    return Verdict(
        passed=not reasons,
        reasons=tuple(reasons),
        numbers=_numbers(measurement, limits),
        limits=limits,
    )


def require_passed(manifest: dict[str, Any], what: str) -> Verdict:
    """Return the passing verdict that a model's manifest carries, else raise GateRefusedError."""
    gate = manifest.get("gate")
    if not isinstance(gate, dict):
        raise GateRefusedError(
            f"{what} was not judged: its manifest has no gate verdict. "
            "Judge it with `raysmith evaluate --set record=true` and its `model`, `base` and "
            "`data`, or let a search find one; a model that is not compressed is not published."
        )
    verdict = Verdict.model_validate(gate)
    if not verdict.passed:
        raise GateRefusedError(
            f"{what} was refused by the gate: {'; '.join(verdict.reasons)}. "
            "Choose a gentler recipe or other limits, and measure again."
        )
    return verdict


def _fault_reasons(measurement: Measurement) -> list[str]:
    faults = measurement.faults
    more = len(faults) - _NAMED_FAULTS
    rest = [f"{more} more parts of the model are broken like these"] if more > 0 else []
    return [*faults[:_NAMED_FAULTS], *rest]


def _quality_reasons(measurement: Measurement, limits: GateConfig) -> list[str]:
    interval = measurement.perplexity_increase
    values = (interval.point, interval.upper, measurement.perplexity, measurement.base_perplexity)
    if not all(math.isfinite(value) for value in values):
        return ["the perplexity is not a finite number: the model is broken or was not measured"]
    reasons = []
    if measurement.num_sequences < limits.eval_sequences:
        reasons.append(
            f"judged on {measurement.num_sequences} sequences, "
            f"eval_sequences={limits.eval_sequences} are asked for"
        )
    if max(interval.point, interval.upper) > limits.max_perplexity_increase:
        reasons.append(
            f"the upper 95% bound of the perplexity increase{_among(measurement)} is "
            f"{interval.upper:.2%} (point {interval.point:.2%}), "
            f"the limit {limits.max_perplexity_increase:.2%}"
        )
    return reasons


def _among(measurement: Measurement) -> str:
    if measurement.num_judged == 1:
        return ""
    return f", for {measurement.num_judged} models at once,"


def _size_reasons(measurement: Measurement, limits: GateConfig) -> list[str]:
    sizes = f"{measurement.size_bytes:,} bytes against {measurement.base_size_bytes:,}"
    if measurement.size_bytes <= 0 or measurement.base_size_bytes <= 0:
        return [f"the size was not measured: {sizes}"]
    if measurement.size_bytes >= measurement.base_size_bytes:
        return [f"the model is not smaller than the one it came from: {sizes}"]
    if measurement.size_ratio > limits.max_size_ratio:
        return [
            f"the size is {measurement.size_ratio:.1%} of the bf16 model's ({sizes}), "
            f"the limit {limits.max_size_ratio:.1%}"
        ]
    return []


def _agreement_reasons(measurement: Measurement, limits: GateConfig) -> list[str]:
    found, least = measurement.agreement, limits.min_agreement
    if least is None:
        return []
    if found is None or not math.isfinite(found.lower):
        return ["the agreement of greedy choices was not measured, and min_agreement asks for it"]
    if found.lower < least:
        return [
            f"the lower 95% bound of the share of greedy choices equal to the base's is "
            f"{found.lower:.1%} (point {found.point:.1%}), the limit {least:.1%}"
        ]
    return []


def _latency_reasons(measurement: Measurement, limits: GateConfig) -> list[str]:
    reasons = []
    ratio, limit = measurement.latency_ratio, limits.max_latency_ratio
    if limit is not None:
        if ratio is None or not math.isfinite(ratio) or ratio <= 0:
            return ["the decode latency was not measured, and max_latency_ratio asks for it"]
        if ratio > limit:
            reasons.append(
                f"the decode latency is {ratio:.2f} of the bf16 model's, the limit {limit:.2f}"
            )
    change = measurement.latency_change
    if limits.require_faster and (change is None or not math.isfinite(change.lower)):
        reasons.append("the decode latency was not measured, and require_faster asks for it")
    elif limits.require_faster and change is not None and change.lower > _SAME_SPEED:
        reasons.append(
            f"the model is slower than the one it came from: decoding takes {change.point:.2f} of "
            f"its time (95% bounds {change.lower:.2f} and {change.upper:.2f}). On this machine the "
            "format saves bytes only; require_faster=false accepts that"
        )
    return reasons


def _numbers(measurement: Measurement, limits: GateConfig) -> dict[str, float | int | None]:
    interval, agreement = measurement.perplexity_increase, measurement.agreement
    return {
        "perplexity": _finite(measurement.perplexity),
        "base_perplexity": _finite(measurement.base_perplexity),
        "perplexity_increase": _finite(interval.point),
        "perplexity_increase_lower95": _finite(interval.lower),
        "perplexity_increase_upper95": _finite(interval.upper),
        "max_perplexity_increase": limits.max_perplexity_increase,
        "num_sequences": measurement.num_sequences,
        "num_judged": measurement.num_judged,
        "size_bytes": measurement.size_bytes,
        "base_size_bytes": measurement.base_size_bytes,
        "size_ratio": _finite(measurement.size_ratio),
        "max_size_ratio": limits.max_size_ratio,
        "latency_ms": measurement.latency_ms,
        "base_latency_ms": measurement.base_latency_ms,
        "latency_ratio": measurement.latency_ratio,
        **_bounds("latency_ratio", measurement.latency_change),
        "max_latency_ratio": limits.max_latency_ratio,
        "agreement": None if agreement is None else _finite(agreement.point),
        **_bounds("agreement", agreement),
        "agreement_prompts": measurement.agreement_prompts,
        "min_agreement": limits.min_agreement,
    }


def _bounds(name: str, interval: Interval | None) -> dict[str, float | int | None]:
    lower, upper = (math.nan, math.nan) if interval is None else (interval.lower, interval.upper)
    return {f"{name}_lower95": _finite(lower), f"{name}_upper95": _finite(upper)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
