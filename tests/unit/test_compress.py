"""The main that applies one recipe to one model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cluster.errors import (
    ClusterError,
    DataError,
    IntegrityError,
    ModelNotFoundError,
    RecipeError,
    VersionExistsError,
)
from cluster.storage import read_manifest, staged_directory, verify_directory, write_manifest
from jobs.compress import compress, main, plan_rows
from jobs.compression.packing import load_model
from jobs.config import CalibrationConfig, CompressConfig, DecoderConfig, Recipe, Step
from jobs.data.tokens import open_split
from jobs.models.decoder import build, save

CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2
)
RECIPE = Recipe(steps=(Step(method="rtn", options={"scheme": "w8a8"}),))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    target = tmp_path / "dense"
    manifest = {"kind": "model", "lineage": {"run": "r1"}}
    with staged_directory(target, manifest) as staging:
        save(build(CONFIG, seed=0), staging)
        (staging / "tokenizer.json").write_text("{}")
        (staging / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    return target


def config_for(source: Path, recipe: Recipe = RECIPE) -> CompressConfig:
    return CompressConfig(model=str(source), output=str(source.parent / "small"), recipe=recipe)


def test_compress_when_done_writes_a_whole_directory_with_its_lineage(source: Path) -> None:
    target = compress(config_for(source))
    manifest = verify_directory(target)
    parent = verify_directory(source)
    assert manifest["kind"] == "model"
    assert manifest["recipe"] == RECIPE.model_dump(mode="json")
    assert manifest["lineage"]["run"] == "r1"
    assert manifest["lineage"]["parent_digest"] == parent["self_sha256"]
    assert load_model(target).schemes["model.layers.0.mlp.up_proj"] == "w8a8"


def test_compress_when_done_keeps_tokenizer_and_end_tokens(source: Path) -> None:
    target = compress(config_for(source))
    assert (target / "tokenizer.json").read_text() == "{}"
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [3, 4]


def test_compress_when_recipe_is_wrong_leaves_nothing(source: Path) -> None:
    recipe = Recipe(steps=(Step(method="rtn", targets=("*nothing*",)),))
    with pytest.raises(RecipeError):
        compress(config_for(source, recipe))
    assert [path.name for path in source.parent.iterdir()] == ["dense"]


def test_compress_when_output_exists_is_refused(source: Path) -> None:
    compress(config_for(source))
    with pytest.raises(VersionExistsError, match=r"`output` = .*small exists"):
        compress(config_for(source))


def test_compress_when_source_is_damaged_is_refused(source: Path) -> None:
    (source / "tokenizer.json").write_text("{ }")
    with pytest.raises(IntegrityError, match=r"tokenizer.json is damaged"):
        compress(config_for(source))


def test_compress_when_source_is_unknown_is_refused(tmp_path: Path) -> None:
    config = CompressConfig(
        model="nobody@1", registry=str(tmp_path / "registry"), output=str(tmp_path / "out")
    )
    with pytest.raises(ModelNotFoundError):
        compress(config)


def test_plan_when_asked_gives_sizes_without_weights(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        path.unlink()
    rows = dict(plan_rows(config_for(source)))
    assert rows["linear layers"] == "7 w8a8"
    assert float(rows["share of bf16"].rstrip("%")) < 70


def test_main_when_given_json_prints_the_result(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = source.parent / "small"
    steps = json.dumps(RECIPE.model_dump(mode="json"))
    arguments = [f"model={source}", f"output={output}", f"recipe={steps}"]
    flags = [flag for argument in arguments for flag in ("--set", argument)]
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(output)
    assert main(flags) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_compressed_model_when_run_gives_finite_logits(source: Path) -> None:
    model = load_model(compress(config_for(source))).model
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all())


def calibrated(source: Path, data: Path, **calibration: object) -> CompressConfig:
    recipe = Recipe(steps=(Step(method="gptq", options={"scheme": "w4a16", "group_size": 32}),))
    return config_for(source, recipe).replace(
        calibration=CalibrationConfig.model_validate(
            {"data": str(data), "num_sequences": 4, "seq_len": 16, **calibration}
        )
    )


@pytest.fixture
def speaker(tmp_path: Path, tiny_data: Path) -> Path:
    """A model with the tokenizer of the prepared text."""
    target = tmp_path / "dense"
    vocab_size = open_split(tiny_data, "train").vocab_size
    with staged_directory(target, {"kind": "model"}) as staging:
        save(build(CONFIG.replace(vocab_size=vocab_size), seed=0), staging)
        shutil.copyfile(tiny_data / "tokenizer" / "tokenizer.json", staging / "tokenizer.json")
    return target


def test_compress_when_a_method_sees_text_writes_what_it_found(
    speaker: Path, tiny_data: Path
) -> None:
    config = calibrated(speaker, tiny_data)
    assert dict(plan_rows(config))["calibration"].startswith("4 sequences of 16 tokens")
    loaded = load_model(compress(config))
    assert loaded.schemes["model.layers.0.mlp.up_proj"] == "w4a16"


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"num_sequences": 10**6}, r"`calibration.num_sequences` = 1000000 .* has \d+ of"),
        ({"seq_len": 513}, r"`calibration.seq_len` = 513 exceeds the model's 512"),
    ],
)
def test_compress_when_text_does_not_suffice_says_so_in_the_plan(
    speaker: Path, tiny_data: Path, calibration: dict[str, object], words: str
) -> None:
    config = calibrated(speaker, tiny_data, **calibration)
    for act in (plan_rows, compress):
        with pytest.raises(DataError, match=words):
            act(config)
    assert not Path(config.output).exists()


def test_compress_when_text_is_of_another_tokenizer_is_refused(
    speaker: Path, tiny_data: Path
) -> None:
    path = speaker / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] = dict(reversed(document["model"]["vocab"].items()))
    first, second = list(document["model"]["vocab"])[:2]
    vocab = document["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="tokenized by another tokenizer"):
        plan_rows(calibrated(speaker, tiny_data))


@pytest.mark.parametrize("whose", ["model", "text"])
def test_plan_when_a_tokenizer_is_missing_warns_of_what_cannot_be_compared(
    speaker: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, whose: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    path = (speaker if whose == "model" else data / "tokenizer") / "tokenizer.json"
    plan_rows(calibrated(speaker, data))
    assert caplog.text == ""
    path.unlink()
    for folder in (speaker, data):
        manifest = {k: v for k, v in read_manifest(folder).items() if k != "self_sha256"}
        write_manifest(folder, manifest)
    plan_rows(calibrated(speaker, data))
    assert f"{path} does not exist: whether the ids" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]"])
def test_plan_when_a_tokenizer_is_damaged_is_refused(
    speaker: Path, tiny_data: Path, content: str
) -> None:
    path = speaker / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{path} is damaged, so that .* Restore it"):
        plan_rows(calibrated(speaker, tiny_data))


def repaired(source: Path, data: Path, **options: object) -> CompressConfig:
    steps = (
        Step(method="width", options={"intermediate_size": 64}),
        Step(method="distill", options={"batch_size": 2, "seq_len": 16, **options}),
        Step(method="rtn", options={"scheme": "w8a8"}),
    )
    return calibrated(source, data).replace(recipe=Recipe(steps=steps))


def test_compress_when_it_repairs_shows_the_text_it_takes_and_writes_the_model(
    speaker: Path, tiny_data: Path
) -> None:
    config = repaired(speaker, tiny_data, num_tokens=100)
    rows = dict(plan_rows(config))
    assert rows["step 2 (distill)"].startswith("trains on 96 of ")
    loaded = load_model(compress(config))
    assert loaded.config.intermediate_size == 64
    assert loaded.schemes["model.layers.0.mlp.up_proj"] == "w8a8"


def test_compress_when_repair_asks_for_more_text_than_there_is_says_so_in_the_plan(
    speaker: Path, tiny_data: Path
) -> None:
    config = repaired(speaker, tiny_data, num_tokens=10**7)
    words = r"step 2 \(distill\) trains on 625000 sequences of 16 .* has \d+ .*Lower `num_tokens`"
    for act in (plan_rows, compress):
        with pytest.raises(DataError, match=words):
            act(config)


def test_compress_when_a_method_needs_text_and_none_is_given_says_so_in_the_plan(
    source: Path,
) -> None:
    recipe = Recipe(steps=(Step(method="wanda", options={"sparsity": 0.5}),))
    with pytest.raises(RecipeError, match=r"step 1 \(wanda\).*Give `calibration`"):
        plan_rows(config_for(source, recipe))


def test_compress_when_there_are_workers_and_no_cluster_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAYSMITH_SESSION", raising=False)
    config = config_for(source).replace(workers=2)
    assert dict(plan_rows(config))["workers"] == "2 layers of a block at a time, as Ray tasks"
    with pytest.raises(ClusterError, match="raysmith up"):
        compress(config)
    assert not Path(config.output).exists()


def test_compress_when_blocks_are_left_out_reports_bytes_beside_the_whole_model(
    speaker: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "[{method: width, options: {intermediate_size: 64}}, {method: rtn}]"
    arguments = [f"model={speaker}", f"output={speaker.parent / 'small'}", f"recipe.steps={steps}"]
    text = f"calibration={{data: {tiny_data}, num_sequences: 4, seq_len: 16}}"
    sets = [word for each in (*arguments, text) for word in ("--set", each)]
    assert main([*sets, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = load_model(speaker.parent / "small")
    assert loaded.config.intermediate_size == 64
    stored = sum(p.stat().st_size for p in (speaker.parent / "small").glob("*.safetensors"))
    assert found["weight_bytes"] == pytest.approx(stored, rel=0.05)
    assert 0.5 < found["size_ratio"] < 0.7
