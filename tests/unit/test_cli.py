"""The command line, called as a person would; nothing here starts a cluster."""

import json
from pathlib import Path

import pytest

import raysmith

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "deploy/recipes/stdlib-tiny.yaml")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))
    monkeypatch.delenv("RAYSMITH_LEDGER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def test_plan_when_asked_for_json_prints_the_items(capsys):
    assert raysmith.main(["plan", "--config", RECIPE, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["model"] == "5,770,496 parameters"
    assert {"memory: weights", "memory: gradients", "memory: optimizer"} <= rows.keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "--config", RECIPE, "--set", "max_stepz=3"], "did you mean `max_steps`?"),
        (["plan", "--config", RECIPE, "--set", "seq_len=long"], "`seq_len` = 'long'"),
        (["plan", "--config", "no-such.yaml"], "no-such.yaml: no such file"),
        (["train", "--config", RECIPE, "--set", "name=../x"], "../x"),
        (
            ["plan", "--config", RECIPE, "--set", "model.decoder.num_layers=100000"],
            "GiB",
        ),
        (["submit", "trane"], "no job `trane`; there are: train"),
        (["submit", "train"], "no session `default`"),
        (["up", "--port", "99999"], "`gcs_port` = 99999"),
        (["models", "promote", "tiny"], "Give name@version"),
        (["models", "promote", "tiny@1"], "tiny"),
        (["serve", "tiny@production"], "no session `default`"),
        (["serve", "tiny@1", "--min-replicas", "0"], "needs `--max-replicas`"),
        (["serve", "tiny@1", "--replicas", "2", "--max-replicas", "3"], "`--replicas` = 2"),
        (["models", "promote", "tiny@1", "--no-wait"], "`--no-wait` needs `--canary`"),
        (["models", "promote", "tiny@1", "--set", "a=1"], "`--set` needs `--canary`"),
        (["search", "--set", "name=s", "--set", "model=nowhere", "--set", "data=d"], "nowhere"),
        (["bogus"], "bogus"),
        (["plan", "--bogus"], "--bogus"),
    ],
)
def test_command_when_input_is_wrong_names_it_and_the_remedy(
    arguments: list[str], expected: str, capsys
):
    assert raysmith.main(arguments) in {1, 2}
    shown = capsys.readouterr()
    assert expected in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--config", RECIPE, "--set", "max_stepz=3"],
        ["plan", "--config", RECIPE, "--set", "model.decoder.num_layers=100000"],
        ["plan", "--bogus"],
        ["submit", "trane"],
        ["up", "--num-cpus", "0"],
        ["models", "promote", "tiny"],
        ["models", "promote", "tiny@1", "--no-wait"],
        ["serve", "tiny@1", "--min-replicas", "0"],
    ],
)
def test_command_when_input_is_wrong_exits_with_2(arguments: list[str]):
    assert raysmith.main(arguments) == 2


def test_status_when_nothing_runs_says_how_to_start(capsys):
    assert raysmith.main(["status"]) == 0
    assert "raysmith up" in capsys.readouterr().out


def test_models_list_when_the_registry_is_empty_prints_no_model(capsys):
    assert raysmith.main(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}
