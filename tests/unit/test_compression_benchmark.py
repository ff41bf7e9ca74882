"""What the compression benchmark makes of losses, files and times: figures, intervals and keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks._remembered import Remembered
from benchmarks.compression import quality, size, speed, structured
from benchmarks.compression.contenders import CONTENDERS, DENSE, W8A8, recipe_of
from benchmarks.compression.estimates import Losses, at_least, at_most, estimate, increase, recovery
from benchmarks.compression.plots import draw
from benchmarks.compression.remembered import Measured, remembered
from benchmarks.compression.resident import main as resident_main
from benchmarks.compression.sections import Bench
from benchmarks.compression.subject import STEPS
from benchmarks.compression.trial import Trial
from cluster.storage import write_manifest
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe, final_shape
from jobs.config import DecoderConfig, Recipe, Step
from jobs.evaluation.quality import sequence_losses
from jobs.models import decoder
from tests.compression_trials import SHAPE, calibration, open_trials, publish


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """Two random models, each with text that it is good at."""
    return open_trials(tmp_path_factory.mktemp("models"))


def losses_of(**means: float) -> Losses:
    """Return losses around some means, the same noise in all."""
    noise = np.random.default_rng(0).normal(0, 0.5, size=400)
    return {name: mean + noise for name, mean in means.items()}


def test_estimate_when_contenders_share_their_noise_is_exact() -> None:
    found = estimate([losses_of(dense=2.0, small=2.01)], increase("small", "dense"))
    assert found.mean == pytest.approx(np.expm1(0.01))
    assert (found.lower, found.upper) == pytest.approx((found.mean, found.mean))


def test_estimate_when_noise_differs_has_the_interval_of_the_mean() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, size=400)
    losses = {"dense": np.full(400, 2.0), "small": 2.0 + noise}
    found = estimate([losses], lambda means: means["small"] - means["dense"], samples=5000)
    half_width = 1.96 * noise.std() / 20
    assert found.upper - noise.mean() == pytest.approx(half_width, rel=0.1)
    assert noise.mean() - found.lower == pytest.approx(half_width, rel=0.1)


def test_estimate_when_models_differ_means_over_them_and_shows_each() -> None:
    models = [losses_of(dense=2.0, small=2.0 + gap) for gap in (0.1, 0.3)]
    found = estimate(models, lambda means: means["small"] - means["dense"])
    assert found.mean == pytest.approx(0.2)
    assert found.per_seed == pytest.approx((0.1, 0.3))


def test_recovery_when_half_the_perplexity_is_won_back_is_half() -> None:
    means = {"dense": np.log(10.0), "naive": np.log(14.0), "method": np.log(12.0)}
    found = estimate([losses_of(**means)], recovery("method", "naive", "dense"))
    assert found.mean == pytest.approx(0.5)
    assert found.lower == pytest.approx(0.5)


@pytest.mark.parametrize(("found", "is_met"), [(1.0, True), (1.5, False)])
def test_claim_when_a_figure_passes_its_upper_limit_is_missed(
    found: float, *, is_met: bool
) -> None:
    assert at_most("x", found, 1.2).document()["is_met"] is is_met
    assert at_least("x", found, 1.2).document()["is_met"] is not is_met


def test_eight_bits_when_measured_reports_increases_with_bounds(trials: list[Trial]) -> None:
    section, claims = quality.eight_bits(trials)
    for name in ("int8_weight", "w8a8", "w8a8_smoothquant"):
        found = section[name]
        assert found["lower"] <= found["point"] <= found["upper"]
        assert found["point"] == pytest.approx(np.mean(found["per_seed"]))
    # Rounded activations change what rounded weights alone give.
    assert section["w8a8"]["point"] != section["int8_weight"]["point"]
    assert {"int8_weight.upper", "w8a8.upper", "w8a8_smoothquant.upper"} < {c.name for c in claims}


@pytest.mark.parametrize(
    ("gap", "noise", "is_met"),
    [(0.0, 0.0, True), (-0.001, 0.001, True), (0.0, 0.05, False), (0.002, 0.0, False)],
)
def test_no_worse_when_the_text_does_not_show_it_is_missed(
    gap: float, noise: float, *, is_met: bool
) -> None:
    losses = losses_of(good=2.0, other=2.0)
    losses = {**losses, "other": losses["other"] + gap + zero_mean(noise)}
    claim = quality._not_worse("x", estimate([losses], increase("other", "good")))
    assert claim.document()["is_met"] is is_met


def zero_mean(noise: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    drawn = np.random.default_rng(2).normal(0, noise, size=400)
    return drawn - drawn.mean()


def test_few_bits_when_measured_is_the_share_of_naive_damage(trials: list[Trial]) -> None:
    section, claims = quality.few_bits(trials[:1])
    worst, found, best = (
        np.exp(trials[0].losses(name).mean()) for name in ("naive-w3", "gptq-w3", DENSE)
    )
    recovered = section["gptq_recovery"]["w3"]
    assert recovered["per_seed"][0] == pytest.approx((worst - found) / (worst - best))
    assert recovered["lower"] <= recovered["mean"] <= recovered["upper"]
    assert section["awq_gptq_versus"]["w4"].keys() == {"gptq", "awq"}
    assert {f"gptq_recovery.{bits}.{key}" for bits in ("w4", "w3") for key in ("mean", "lower")} < {
        claim.name for claim in claims
    }


def test_pruning_when_measured_compares_methods_with_magnitude(trials: list[Trial]) -> None:
    section, claims = quality.pruning(trials[:1])
    assert section["pruning"].keys() == {"unstructured", "2:4"}
    of_rows = section["pruning"]["unstructured"].pop("removed_of_rows")
    assert of_rows["wanda"] != section["pruning"]["unstructured"]["wanda"]
    for found in section["pruning"].values():
        assert found.keys() == {"wanda", "sparsegpt", "sparsegpt_versus_wanda"}
    assert len(claims) == 6


def test_contenders_when_drawn_have_bytes_and_intervals(
    trials: list[Trial], tmp_path: Path
) -> None:
    quality.few_bits(trials[:1])
    found = quality.contenders(trials[:1])
    assert found["gptq-w3"]["size_ratio"] < found["gptq-w4"]["size_ratio"] < 1
    assert "increase" not in found[DENSE]
    draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_losses_when_measured_before_are_read_unless_the_text_is_another(tmp_path: Path) -> None:
    sequences, calibration = np.arange(20).reshape(2, 10), np.arange(8).reshape(2, 4)
    (trial, *_) = open_trials(tmp_path / "models")

    def known(sequences: NDArray[np.int64]) -> Remembered:
        return remembered(tmp_path / "losses", trial.model, [sequences, calibration])

    plain, gptq = (CONTENDERS[name].document() for name in ("naive-w4", "gptq-w4"))
    measured = Measured(np.array([1.5, 2.5]), "2026-11-30")
    known(sequences).write(plain, measured.to_bytes())
    data = known(sequences).read(plain)
    assert data is not None
    found = Measured.from_bytes(data)
    assert np.array_equal(found.losses, measured.losses)
    assert found.date == measured.date
    assert known(sequences).read(gptq) is None
    assert known(sequences + 1).read(plain) is None


def test_trial_when_losses_are_remembered_measures_nothing(tmp_path: Path) -> None:
    (trial, *_) = open_trials(tmp_path / "models")
    measured = trial.losses(DENSE)
    said: list[str] = []
    known = remembered(tmp_path, trial.model, [trial.sequences])
    for _ in range(2):
        again = Trial("m", trial.model, trial.sequences, calibration(), said.append, known)
        assert np.array_equal(again.losses(DENSE), measured)
    assert [", measured 20" in line for line in said] == [False, True]


@pytest.mark.parametrize("name", ["awq-w4", "gptq-w3", "wanda-unstructured"])
def test_trial_when_files_round_what_is_not_quantized_has_their_losses(
    trials: list[Trial], tmp_path: Path, name: str
) -> None:
    trial = trials[0]
    compressed = trial.compress(CONTENDERS[name].recipe)
    save_compressed(compressed, tmp_path)
    stored = sequence_losses(load_model(tmp_path, verify=False).model, trial.sequences)
    np.testing.assert_allclose(trial.losses(name), stored, rtol=0, atol=1e-6)
    if name == "awq-w4":  # Its norms are divided by scales that bfloat16 does not hold.
        unrounded = sequence_losses(compressed.model, trial.sequences)
        assert np.abs(unrounded - stored).max() > 1e-5


def test_trial_when_asked_again_computes_nothing(trials: list[Trial]) -> None:
    assert trials[0].losses(DENSE) is trials[0].losses(DENSE)


def test_structured_when_cut_reports_perplexities_and_latency(
    trials: list[Trial], tmp_path: Path
) -> None:
    cuts = recipe_of(
        ("depth", {"num_blocks": 1}),
        ("width", {"intermediate_size": 128}),
        ("distill", {"num_tokens": 64, "batch_size": 2, "seq_len": 16}),
    )
    rates: list[float] = []

    def scratch(shape: DecoderConfig, lr: float) -> Path:
        rates.append(lr)
        path = tmp_path / f"scratch-{len(rates)}"
        # The second is the best on validation text, whatever it is on the test split.
        loss = {"validation_loss": abs(lr - 2e-3)}
        return publish(path, shape, seed=len(rates), metrics=loss)

    plans = [structured.Plan(cuts, scratch, tmp_path / "repaired") for _ in trials]
    section, claims = structured.measure(trials, plans, rounds=1)
    found = section["structured"]
    assert final_shape(SHAPE, cuts).num_layers == found["shape"]["num_layers"] == 1
    assert found["parameters_removed"] > 1 / 3
    assert found["scratch_lr"] == 2e-3
    assert rates == [*structured.SCRATCH_LRS, 2e-3, 2e-3]
    versus = found["repaired_versus_scratch"]
    assert found["better"] is (versus["upper"] < 0)
    perplexities = [found[f"perplexity_{name}"]["per_seed"][1] for name in ("repaired", "scratch")]
    assert versus["per_seed"][1] == pytest.approx(perplexities[0] / perplexities[1] - 1)
    assert found["w8a8_increase_upper"] == found["w8a8_increase"]["upper"]
    assert found["latency_ratio"] > 0
    assert len(claims) == 4


def saved(path: Path, recipe: Recipe) -> Path:
    save_compressed(apply_recipe(decoder.build(SHAPE, 0), recipe), path)
    write_manifest(path, {"kind": "model"})
    return path


def test_true_size_when_measured_is_the_worst_of_the_formats(tmp_path: Path) -> None:
    formats = {
        name: (SHAPE, recipe, saved(tmp_path / name, recipe))
        for name, recipe in {
            "w8a8": W8A8,
            "w3": recipe_of(("rtn", {"scheme": "w3a16", "group_size": 128})),
        }.items()
    }
    grown = {"w8a8": 300_000, "w3": 900_000}

    def memory(path: Path) -> Mapping[str, Any]:
        return {"grown_bytes": grown[path.name]}

    section, _ = size.measure(formats, memory)
    found = section["true_size"]
    files = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in formats}
    assert found["memory_ratio"] == pytest.approx(300_000 / files["w8a8"])
    assert found["w3_memory_ratio"] == pytest.approx(900_000 / files["w3"])
    assert found["disk_ratio"] == max(each["disk_ratio"] for each in found["formats"].values())
    assert found["disk_ratio"] > 1


def test_theory_bytes_when_the_tied_head_is_rounded_counts_its_copy() -> None:
    step = {"scheme": "w4a16", "group_size": 128}
    blocks = recipe_of(("rtn", step))
    rounded = blocks.steps[0].replace(targets=("*", "lm_head"))
    rows, columns = SHAPE.vocab_size, SHAPE.hidden_size
    copy_bytes = rows * columns / 2 + 2 * rows
    both = size.theory_bytes(SHAPE, Recipe(steps=(rounded,)))
    assert both - size.theory_bytes(SHAPE, blocks) == copy_bytes


def test_resident_when_loaded_prints_growth_and_weight_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resident_main([str(saved(tmp_path / "w8a8", W8A8))]) == 0
    out = capsys.readouterr().out
    assert '"grown_bytes"' in out
    assert '"weight_bytes"' in out


def test_speed_when_measured_divides_medians(tmp_path: Path) -> None:
    directories = {DENSE: publish(tmp_path / "dense"), "w8a8": saved(tmp_path / "w8a8", W8A8)}
    batches = {1: (DENSE, "w8a8"), 2: (DENSE, "w8a8")}
    section, claims = speed.measure(directories, 1, tokens=2, batches=batches)
    found = section["speed"]
    for batch in batches:
        times = [found["times"][f"{name}_batch{batch}"] for name in (DENSE, "w8a8")]
        assert found[f"w8a8_batch{batch}"] == pytest.approx(times[0]["p50_ms"] / times[1]["p50_ms"])
        assert times[1]["tokens_per_s"] == pytest.approx(1e3 * batch / times[1]["p50_ms"])
    assert [claim.name for claim in claims] == ["speed.w8a8_batch1"]
    assert any(name.startswith("w8a8 ") for name in found["operators"]["w8a8"])


def test_speed_when_two_formats_have_four_bits_w4_is_the_faster(tmp_path: Path) -> None:
    directories = {DENSE: publish(tmp_path / "dense")}
    for scheme in ("w4a16", "w4a8"):
        step = Step(method="rtn", options={"scheme": scheme, "group_size": 128})
        directories[f"{scheme}-g128"] = saved(tmp_path / scheme, Recipe(steps=(step,)))
    section, claims = speed.measure(directories, 1, tokens=2, batches={1: tuple(directories)})
    found = section["speed"]
    assert found["w4_batch1"] == max(found["w4a16_batch1"], found["w4a8_batch1"])
    assert found[f"{found['w4_format']}_batch1"] == found["w4_batch1"]
    assert [claim.name for claim in claims] == ["speed.w4_batch1"]


def test_facts_when_models_are_on_trial_count_held_out_tokens(trials: list[Trial]) -> None:
    bench = Bench([0, 1], STEPS, None, 16, 1, print, _trials=trials)
    facts, claims = bench.facts()
    assert facts["held_out_tokens"] == trials[0].sequences[:, 1:].size
    assert facts["calibration_tokens"] == 16 * 32
    (claim,) = claims
    assert claim.document() == {
        "found": facts["held_out_tokens"],
        "at_least": 200_000,
        "is_met": False,
    }
    assert Bench([0], STEPS, None, 16, 1, print).facts() == ({}, [])
