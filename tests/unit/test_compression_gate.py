"""The benchmark's trial of the gate: which cases it judges, and that all checks reach them."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.compression import gate
from benchmarks.compression.__main__ import main
from benchmarks.compression.contenders import CONTENDERS, DENSE
from benchmarks.compression.copies import Copies, copies_of, rewritten
from benchmarks.compression.trial import Trial
from cluster.errors import ConfigError
from jobs.config import GateConfig
from jobs.models import decoder
from tests.compression_trials import SHAPE, calibration, open_trials

# Models this small gain no time from 8 bits.
LIMITS = GateConfig(
    eval_sequences=8, bootstrap_samples=200, max_size_ratio=1.0, require_faster=False
)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """One random model with text that it is good at."""
    return open_trials(tmp_path_factory.mktemp("models"), 1)


def test_rewritten_when_heads_and_channels_move_computes_the_same(trials: list[Trial]) -> None:
    before = decoder.load(trials[0].model)
    after = rewritten(decoder.load(trials[0].model), seed=3)
    for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"):
        layers = [m.get_submodule(f"model.layers.0.{name}") for m in (before, after)]
        assert not torch.equal(*(layer.get_parameter("weight") for layer in layers))
    tokens_BT = calibration().tokens_NT[:4]
    torch.testing.assert_close(after(tokens_BT), before(tokens_BT), rtol=1e-5, atol=1e-5)


def test_gate_when_judging_refuses_bad_recipes_and_accepts_equal_models(
    trials: list[Trial],
) -> None:
    section, claims = gate.measure(trials, num_cases=3, limits=LIMITS)
    found = section["gate"]
    for kind in ("equal", "equal_dense"):
        assert found[f"num_{kind}"] == 3
        assert found[f"num_{kind}_refused"] == sum(not c["passed"] for c in found[kind]) == 0
        for case in found[kind]:
            assert case["latency_ratio"] > 0
            assert case["min_agreement"] <= case["agreement_lower95"] <= case["agreement"]
    # Copies in W8A8 differ by rounding, and each otherwise; dense ones by the order of sums.
    assert len({case["increase"] for case in found["equal"]}) == 3
    assert all(abs(case["increase"]) > 1e-5 for case in found["equal"])
    assert all(abs(case["increase"]) < 1e-5 for case in found["equal_dense"])
    assert found["num_bad"] == 3
    for case in found["bad"]:
        assert case["lower"] >= 3 * case["limit"] * (1 - 1e-9)
        assert case["passed"] == (case["increase_upper95"] <= case["limit"])
    assert found["num_bad_accepted"] == sum(case["passed"] for case in found["bad"])
    too_few = {c.name for c in claims if not c.document()["is_met"]}
    assert {"gate.num_bad", "gate.num_equal", "gate.num_equal_dense"} <= too_few


def test_bad_cases_when_recipes_are_few_judges_each_on_several_draws(
    trials: list[Trial],
) -> None:
    found = gate._bad_cases(trials, gate.NUM_CASES, LIMITS)
    judged = Counter((case["recipe"], case["first_sequence"]) for case in found)
    assert len(found) == gate.NUM_CASES
    assert max(judged.values()) == 1


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_perplexity_increase": 1e-9}, "perplexity increase"),
        ({"max_latency_ratio": 1e-3}, "decode latency"),
        ({"max_size_ratio": 1e-3}, "the size is"),
        ({"eval_sequences": 9}, "judged on 8 sequences"),
    ],
)
def test_copy_when_a_limit_is_too_strict_is_refused_for_it(
    trials: list[Trial], limit: dict[str, float], reason: str
) -> None:
    verdict = Copies(trials[0], "w8a8", LIMITS.replace(**limit)).verdict(0, slice(0, 8))
    assert not verdict.passed
    assert any(reason in each for each in verdict.reasons)


def test_limits_of_copies_when_a_copy_costs_much_are_three_times_that(
    trials: list[Trial],
) -> None:
    strict = LIMITS.replace(max_perplexity_increase=1e-9)
    assert copies_of(trials[0], DENSE, LIMITS).limits.max_perplexity_increase == 0.02
    found = copies_of(trials[0], "w8a8", strict).limits
    assert found.max_perplexity_increase > 1e-9
    assert found.min_agreement is not None


def test_gate_when_sequences_are_few_says_how_many_it_needs(
    trials: list[Trial], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="reads 128 held-out sequences for a verdict"):
        gate.measure(trials)
    out = tmp_path / "out.json"
    assert main(["--json", str(out), "--sequences", "64"]) == ConfigError.exit_code
    assert not out.exists()


def test_contender_names_when_pruned_or_of_few_bits_are_the_gates_pool() -> None:
    assert set(gate._POOL) < set(CONTENDERS)
    assert {"naive-w3", "magnitude-2:4"} < set(gate._POOL)
    assert DENSE not in gate._POOL
    assert SHAPE.num_heads > SHAPE.num_kv_heads  # Groups of heads are moved too.
