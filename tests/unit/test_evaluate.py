"""A model measured beside its origin: judged, recorded in its manifest, published."""

import json
from pathlib import Path

import pytest
import torch
from tiny_training import write_random_data

from cluster.errors import ConfigError, GateRefusedError, IntegrityError, ModelFormatError
from cluster.storage import read_manifest, staged_directory, verify_directory
from jobs.compression.packing import save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig, EvaluateConfig, PublishConfig, Recipe, Step
from jobs.evaluate import main
from jobs.evaluation.compare import evaluate
from jobs.models.decoder import build, save
from jobs.publish import publish

DECODER = DecoderConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=48,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w4a16"}),))
    with staged_directory(folder / "base", {"kind": "model"}) as staging:
        save(build(DECODER, seed=0), staging)
    compressed = apply_recipe(build(DECODER, seed=0), recipe)
    with staged_directory(folder / "small", {"kind": "model", "metrics": {"a": 1}}) as staging:
        save_compressed(compressed, staging)
    write_random_data(folder / "data", vocab_size=128, num_tokens=1000)
    return folder


def _config(made: Path, **changes: object) -> EvaluateConfig:
    values: dict[str, object] = {
        "model": str(made / "small"),
        "base": str(made / "base"),
        "data": str(made / "data"),
        "registry": str(made / "registry"),
        "seq_len": 32,
        "gate": {
            "eval_sequences": 16,
            "bootstrap_samples": 200,
            "max_size_ratio": 0.6,
            "require_faster": False,  # so small a model is not: kernels are not what takes time
        },
    }
    return EvaluateConfig.model_validate({**values, **changes})


def test_evaluate_when_the_model_is_compressed_measures_both_and_passes(made: Path) -> None:
    found = evaluate(_config(made))
    numbers = found.verdict.numbers
    assert found.verdict.passed
    assert numbers["num_sequences"] == 16
    weights = sum(path.stat().st_size for path in (made / "small").glob("*.safetensors"))
    assert numbers["size_bytes"] == weights
    assert found.latency.p50_ms > 0
    assert found.latency.weight_bytes < found.base_latency.weight_bytes
    assert numbers["agreement_prompts"] == 16
    assert 0 < numbers["agreement_lower95"] <= numbers["agreement"] <= 1
    assert numbers["latency_ratio_lower95"] <= numbers["latency_ratio_upper95"]
    assert "gate" not in read_manifest(made / "small")


def test_evaluate_when_the_model_is_its_own_base_refuses_it(made: Path) -> None:
    found = evaluate(_config(made, model=str(made / "base")))
    assert not found.verdict.passed
    assert "not smaller" in found.verdict.reasons[0]
    numbers = found.verdict.numbers
    assert numbers["perplexity_increase"] == 0.0
    assert numbers["perplexity_increase_upper95"] == 0.0
    assert numbers["agreement_lower95"] == 1.0
    assert len(found.verdict.reasons) == 1


def test_evaluate_when_the_cache_is_int8_measures_with_it(made: Path) -> None:
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w4a16"}),), kv_cache="int8")
    compressed = apply_recipe(build(DECODER, seed=0), recipe)
    with staged_directory(made / "cached", {"kind": "model"}) as staging:
        save_compressed(compressed, staging)
    plain, found = evaluate(_config(made)), evaluate(_config(made, model=str(made / "cached")))
    head_bytes = DECODER.resolved_head_dim
    assert found.base_latency.cache_bytes == plain.latency.cache_bytes
    ratio = found.latency.cache_bytes / found.base_latency.cache_bytes
    assert ratio == (head_bytes + 4) / (4 * head_bytes)
    losses = [x.verdict.numbers["perplexity_increase"] for x in (plain, found)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_evaluate_when_recorded_lets_the_model_be_published(made: Path) -> None:
    target = PublishConfig(registry=str(made / "registry"), name="m")
    with pytest.raises(GateRefusedError, match="no gate verdict"):
        publish(made / "small", target)
    evaluate(_config(made, record=True))
    manifest = verify_directory(made / "small")
    assert manifest["metrics"]["a"] == 1
    gate = manifest["gate"]
    assert gate["limits"]["seed"] == 0
    assert gate["measured_on"]["seq_len"] == 32
    assert gate["measured_on"]["base_sha256"] == read_manifest(made / "base")["self_sha256"]
    entry = publish(made / "small", target)
    assert entry.metrics["size_ratio"] == manifest["gate"]["numbers"]["size_ratio"]
    assert evaluate(_config(made, model="m@production")).verdict.passed
    with pytest.raises(ConfigError, match="never changed"):
        evaluate(_config(made, model="m@production", record=True))


def test_evaluate_when_a_layer_is_zero_names_it(made: Path, tmp_path: Path) -> None:
    model = build(DECODER, seed=0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    recipe = Recipe(steps=(Step(method="rtn", options={"scheme": "w4a16"}),))
    with staged_directory(tmp_path / "m", {"kind": "model"}) as staging:
        save_compressed(apply_recipe(model, recipe), staging)
    found = evaluate(_config(made, model=str(tmp_path / "m")))
    assert not found.verdict.passed
    assert "`model.layers.1.mlp.down_proj" in found.verdict.reasons[0]
    assert "zeros" in found.verdict.reasons[0]


def test_evaluate_when_a_file_is_damaged_is_refused(made: Path, tmp_path: Path) -> None:
    with staged_directory(tmp_path / "m", {"kind": "model"}) as staging:
        save(build(DECODER, seed=0), staging)
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        evaluate(_config(made, model=str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"seq_len": 64}, ConfigError, "48 positions"),
        ({"gate": {"eval_sequences": 500}}, ConfigError, "eval_sequences"),
        ({"base": "nowhere"}, ModelFormatError, "no such directory"),
    ],
)
def test_evaluate_when_the_input_is_wrong_says_so(
    made: Path, changes: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        evaluate(_config(made, **changes))


def test_evaluate_main_when_dry_run_prints_the_plan(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = _config(made).model_dump(mode="json", include={"model", "base", "data", "seq_len"})
    arguments = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    arguments += ["--set", "gate.eval_sequences=16", "--dry-run", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == "16 of 32 tokens"
