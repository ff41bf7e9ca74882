"""A search on a real local cluster: to its end, after a kill of the driver, and refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from local_head import local_head
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import write_random_data

from cluster.config import load_config
from cluster.session import Session
from cluster.storage import read_manifest, staged_directory, verify_directory
from jobs.compression.packing import load_model
from jobs.config import DecoderConfig, PublishConfig, SearchConfig
from jobs.data.tokenizer import copy_tokenizer, train_tokenizer
from jobs.evaluation.gate import require_passed
from jobs.models.decoder import build, save
from jobs.publish import publish
from jobs.registry import Registry
from jobs.search.journal import Journal
from jobs.search.space import build_space

pytestmark = pytest.mark.ray

DECODER = DecoderConfig(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model and packed data, as a training run leaves them."""
    folder = tmp_path_factory.mktemp("search")
    with staged_directory(folder / "model", {"kind": "model", "lineage": {"run": "r"}}) as staging:
        model = build(DECODER, seed=0)
        with torch.no_grad():  # Its logit is 0, never the highest: no answer ends early.
            model.model.embed_tokens.weight[1] = 0
        save(model, staging)
        train_tokenizer(["def read_file(path): return path\n" * 20], 300, folder / "tokenizer")
        copy_tokenizer(folder / "tokenizer", staging)
    write_random_data(folder / "data", vocab_size=256, num_tokens=4000)
    return folder


@pytest.fixture(scope="module")
def session(home: Path) -> Iterator[Session]:
    with local_head(home, "search") as running:
        yield running


def _write_config(home: Path, name: str, **changes: object) -> Path:
    config = {
        "name": name,
        "model": "model",
        "data": "data",
        "seq_len": 32,
        "num_trials": 12,
        "probe_sequences": 4,
        "workload": {"prompt_tokens": 16, "output_tokens": 8},
        "served_finalists": 0,
        "rungs": [
            {"eval_sequences": 8, "keep_ratio": 0.3},
            {"eval_sequences": 16, "real": True},
        ],
        "gate": {"eval_sequences": 16, "bootstrap_samples": 200},
        **changes,
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _start(session: Session, config: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.search", "--config", str(config), "--json"],
        env={**os.environ, **session.environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _journal(home: Path, name: str) -> list[str]:
    return (home / "runs" / name / "journal.jsonl").read_text().splitlines()


def test_search_when_the_driver_is_killed_goes_on_and_finds_a_winner_that_publishes(
    home: Path, session: Session
) -> None:
    config = _write_config(home, "resumed", served_finalists=1)
    driver = _start(session, config)
    assert driver.stderr is not None
    num_lines = 0
    for line in driver.stderr:
        num_lines += line.startswith("rung")
        if num_lines == 4:
            break
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    kept = _journal(home, "resumed")
    assert len(kept) >= 5

    driver = _start(session, config)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    after = _journal(home, "resumed")
    assert after[: len(kept)] == kept
    tasks = [json.dumps(json.loads(json.loads(line)["body"]).get("task")) for line in after]
    assert len(set(tasks)) == len(tasks)

    summary = json.loads(out)
    assert (summary["trials"], summary["rungs"]) == (12, 2)
    assert summary["winner"] == "w4a16 all"
    assert summary["size_ratio"] <= 0.45
    assert summary["latency_ms"] > 0
    _check_winner(home / "runs" / "resumed" / "winner", home)
    _check_records(home / "runs" / "resumed")


def _check_winner(winner: Path, home: Path) -> None:
    manifest = verify_directory(winner)
    assert require_passed(manifest, "winner").passed
    assert manifest["lineage"]["run"] == "r"
    assert manifest["lineage"]["parent_digest"] == read_manifest(home / "model")["self_sha256"]
    assert (winner / "tokenizer.json").is_file()
    schemes = load_model(winner).schemes
    assert {schemes[name] for name in schemes if name != "lm_head"} == {"w4a16"}
    registry = home / "registry"
    publish(winner, PublishConfig(registry=str(registry), name="tiny"))
    assert Registry(registry).resolve("tiny@production").metrics["size_ratio"] <= 0.45


def _check_records(run_dir: Path) -> None:
    document = json.loads((run_dir / "search.json").read_text())
    winner = document["trials"][document["winner"]]
    assert winner["served_ms"] > winner["latency_ms"] / 2
    assert winner["predicted_served_ms"] > 0
    study = optuna.load_study(study_name="resumed", storage=f"sqlite:///{run_dir}/optuna.db")
    states = [trial.state.name for trial in study.trials]
    assert len(states) == 12
    assert states.count("COMPLETE") == 4  # 0.3 of 12, rounded up
    assert set(states) == {"COMPLETE", "PRUNED"}
    assert {tuple(trial.params) for trial in study.trials} == {
        ("self_attn 0-1", "mlp 0-1", "self_attn 2-3", "mlp 2-3")
    }
    events = EventAccumulator(str(run_dir / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("trials/size_ratio")] == list(range(13))
    page = (run_dir / "report.html").read_text()
    assert "Why this model won" in page
    assert page.count("<svg") == 3


def test_search_when_no_model_can_keep_to_the_limits_exits_2_and_names_the_nearest(
    home: Path, session: Session
) -> None:
    config = _write_config(home, "contradictory", limits={"max_bytes": 1000})
    _, err = _start(session, config).communicate(timeout=120)
    assert "`max_bytes` leaves nothing of what the others allow" in err
    assert "The nearest is `w4a16 all`" in err


def test_search_when_the_gate_refuses_all_exits_1_and_leaves_the_trials(
    home: Path, session: Session
) -> None:
    changes = {"schemes": ["w3a16"], "rungs": [{"eval_sequences": 8, "real": True}]}
    config = _write_config(home, "refused", **changes)
    space = build_space(load_config(SearchConfig, config), DECODER)
    # Between what tensors take and what the file takes, which also has a header.
    ratio = space.size_bytes(space.uniform(0)) / space.base_bytes + 0.001
    gate = {"eval_sequences": 16, "bootstrap_samples": 200, "max_size_ratio": ratio}
    config = _write_config(home, "refused", **changes, gate=gate)
    driver = _start(session, config)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert "the nearest was w3a16 all: the size is" in err
    document = json.loads((home / "runs" / "refused" / "search.json").read_text())
    assert document["winner"] is None
    assert not document["verdict"]["passed"]
    assert not (home / "runs" / "refused" / "winner").exists()


def test_search_when_the_configuration_changes_is_refused(home: Path, session: Session) -> None:
    Journal(home / "runs" / "changed" / "journal.jsonl", "another fingerprint")
    driver = _start(session, _write_config(home, "changed"))
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 2
    assert "another configuration" in err
