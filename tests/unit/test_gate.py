import math

import numpy as np
import pytest

from cluster.errors import GateRefusedError
from jobs.config import GateConfig
from jobs.evaluation.gate import Measurement, judge, require_passed
from jobs.evaluation.intervals import Interval

GOOD = Measurement(
    perplexity_increase=Interval(point=0.005, lower=0.001, upper=0.009),
    base_perplexity=50.0,
    perplexity=50.25,
    num_sequences=128,
    size_bytes=400,
    base_size_bytes=1000,
    latency_ms=8.0,
    base_latency_ms=10.0,
    latency_change=Interval(point=0.8, lower=0.78, upper=0.82),
)
LIMITS = GateConfig()


def test_judge_when_all_within_limits_passes_without_reasons() -> None:
    verdict = judge(GOOD, LIMITS)
    assert verdict.passed
    assert verdict.reasons == ()
    assert verdict.numbers["size_ratio"] == pytest.approx(0.4)


def test_judge_when_speed_was_not_measured_refuses_unless_it_is_not_asked_for() -> None:
    blind = GOOD.replace(latency_change=None)
    assert "require_faster" in judge(blind, LIMITS).reasons[0]
    assert judge(blind, GateConfig(require_faster=False)).passed


def test_measurement_when_several_are_judged_has_wider_bounds() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(3.0, 0.5, 128)
    found = base + generator.normal(0.01, 0.05, 128)
    sizes = {"size_bytes": 400, "base_size_bytes": 1000, "latency_change": GOOD.latency_change}
    one, four = (
        Measurement.from_losses(base, found, LIMITS, num_judged=number, **sizes)
        for number in (1, 4)
    )
    assert four.perplexity_increase.upper > one.perplexity_increase.upper
    assert four.perplexity_increase.point == one.perplexity_increase.point
    tight = GateConfig(max_perplexity_increase=0.001, require_faster=False)
    assert "for 4 models at once" in judge(four, tight).reasons[0]


def test_judge_when_point_is_good_but_upper_bound_is_not_refuses() -> None:
    wide = GOOD.replace(perplexity_increase=Interval(point=0.005, lower=-0.02, upper=0.03))
    verdict = judge(wide, LIMITS)
    assert not verdict.passed
    assert "3.00%" in verdict.reasons[0]


@pytest.mark.parametrize("size_bytes", [1000, 1001])
def test_judge_when_not_smaller_refuses_whatever_the_limit(size_bytes: int) -> None:
    verdict = judge(GOOD.replace(size_bytes=size_bytes), GateConfig(max_size_ratio=5.0))
    assert not verdict.passed
    assert "not smaller" in verdict.reasons[0]


def test_judge_when_size_limit_is_broken_names_value_and_limit() -> None:
    verdict = judge(GOOD.replace(size_bytes=460), LIMITS)
    assert "46.0%" in verdict.reasons[0]
    assert "45.0%" in verdict.reasons[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["perplexity", "base_perplexity", "perplexity_increase"])
def test_judge_when_a_number_is_not_finite_refuses(bad: float, field: str) -> None:
    value = Interval(point=bad, lower=bad, upper=bad) if field == "perplexity_increase" else bad
    verdict = judge(GOOD.replace(**{field: value}), LIMITS)
    assert not verdict.passed
    assert all(v is None or math.isfinite(v) for v in verdict.numbers.values())


def test_judge_when_size_was_not_measured_refuses() -> None:
    assert not judge(GOOD.replace(size_bytes=0), LIMITS).passed
    assert not judge(GOOD.replace(base_size_bytes=0), LIMITS).passed


def test_judge_when_too_few_sequences_refuses() -> None:
    assert "judged on 127" in judge(GOOD.replace(num_sequences=127), LIMITS).reasons[0]


def test_judge_when_latency_is_asked_for_and_missing_refuses() -> None:
    limits = GateConfig(max_latency_ratio=1.0)
    assert judge(GOOD, limits).passed
    assert not judge(GOOD.replace(latency_ms=None), limits).passed
    assert "1.20" in judge(GOOD.replace(latency_ms=12.0), limits).reasons[0]


@pytest.mark.parametrize("lower", [0.9, 1.01, 1.05])
def test_judge_when_slower_beyond_noise_refuses(lower: float) -> None:
    is_refused = lower > 1.02
    slower = GOOD.replace(latency_change=Interval(point=1.1, lower=lower, upper=1.2))
    verdict = judge(slower, LIMITS)
    assert verdict.passed is not is_refused
    assert verdict.numbers["latency_ratio_lower95"] == lower
    if is_refused:
        assert "require_faster=false" in verdict.reasons[0]
    assert judge(slower, GateConfig(require_faster=False)).passed


def test_judge_when_agreement_is_asked_for_takes_its_lower_bound() -> None:
    limits = GateConfig(min_agreement=0.9)
    agreeing = GOOD.replace(agreement=Interval(point=0.95, lower=0.89, upper=0.99))
    assert judge(agreeing, LIMITS).passed
    assert judge(agreeing, LIMITS).numbers["agreement"] == 0.95
    assert "89.0%" in judge(agreeing, limits).reasons[0]
    assert "not measured" in judge(GOOD, limits).reasons[0]
    assert judge(agreeing, limits.replace(min_agreement=0.89)).passed


def test_judge_when_a_part_is_broken_refuses_and_names_the_first_ones() -> None:
    verdict = judge(GOOD.replace(faults=("a", "b", "c", "d", "e")), LIMITS)
    assert verdict.reasons[:3] == ("a", "b", "c")
    assert "2 more" in verdict.reasons[3]


def test_judge_when_given_bad_and_equal_models_errs_on_none() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(4.0, 0.5, size=128)
    sizes = {"size_bytes": 400, "base_size_bytes": 1000, "latency_change": GOOD.latency_change}
    for _ in range(20):
        worse = base + np.log1p(3 * LIMITS.max_perplexity_increase) + generator.normal(0, 0.05, 128)
        bad = Measurement.from_losses(base, worse, LIMITS, **sizes)
        equal = Measurement.from_losses(base, base.copy(), LIMITS, **sizes)
        assert not judge(bad, LIMITS).passed
        assert judge(equal, LIMITS).passed
        assert equal.perplexity_increase.upper == 0.0


def test_judge_when_it_decides_keeps_all_limits_and_seeds() -> None:
    assert judge(GOOD, LIMITS).limits == LIMITS


def test_judge_when_several_limits_are_broken_gives_every_reason() -> None:
    bad = GOOD.replace(
        size_bytes=900, perplexity_increase=Interval(point=0.5, lower=0.4, upper=0.6)
    )
    assert len(judge(bad, LIMITS).reasons) == 2


def test_require_passed_when_verdict_is_missing_or_refused_raises() -> None:
    with pytest.raises(GateRefusedError, match="no gate verdict"):
        require_passed({}, "m")
    refused = judge(GOOD.replace(size_bytes=900), LIMITS)
    with pytest.raises(GateRefusedError, match=r"90\.0%"):
        require_passed({"gate": refused.model_dump(mode="json")}, "m")


def test_require_passed_when_passed_returns_the_verdict() -> None:
    verdict = judge(GOOD, LIMITS)
    assert require_passed({"gate": verdict.model_dump(mode="json")}, "m") == verdict
