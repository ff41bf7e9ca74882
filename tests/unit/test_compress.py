"""The main that applies one recipe to one model."""

import json
from pathlib import Path

import pytest
import torch

from cluster.errors import IntegrityError, ModelNotFoundError, RecipeError, VersionExistsError
from cluster.storage import staged_directory, verify_directory
from jobs.compress import compress, main, plan_rows
from jobs.compression.packing import load_model
from jobs.config import CompressConfig, DecoderConfig, Recipe, Step
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
