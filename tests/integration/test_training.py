"""Training over several workers: plain processes, and Ray Train through the real entry point."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_training import losses, tiny_config, train_on

from cluster.session import HeadConfig, Session, start_head, stop_head
from cluster.storage import verify_directory
from jobs.config import TrainConfig
from jobs.training.checkpoint import newest_checkpoint

STEPS = 50


def _config(corpus: str, num_workers: int, micro_batch_size: int, **changes: object) -> TrainConfig:
    return tiny_config(
        corpus,
        max_steps=STEPS,
        global_batch_size=8,
        micro_batch_size=micro_batch_size,
        scaling={"num_workers": num_workers},
        **changes,
    )


@pytest.mark.usefixtures("one_thread")
def test_training_when_workers_and_accumulation_differ_gives_the_same_losses(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    curves = {}
    for num_workers, micro_batch_size in ((1, 8), (2, 4), (2, 1)):
        run_dir = tmp_path / f"{num_workers}-{micro_batch_size}"
        config = _config(tiny_corpus, num_workers, micro_batch_size)
        train_on(num_workers, config, tiny_data, run_dir)
        curves[num_workers, micro_batch_size] = losses(run_dir)
    one = curves.pop((1, 8))
    assert len(one) == STEPS
    assert one[STEPS] < one[1] - 1.0
    for curve in curves.values():
        assert max(abs(curve[step] - one[step]) for step in one) < 1e-4


@pytest.mark.usefixtures("one_thread")
def test_training_when_resumed_on_fewer_workers_goes_on_with_the_same_batches(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    control, run_dir = tmp_path / "control", tmp_path / "run"
    config = _config(tiny_corpus, 1, 8)
    train_on(1, config, tiny_data, control)
    train_on(2, _config(tiny_corpus, 2, 4), tiny_data, run_dir)
    for checkpoint in sorted((run_dir / "checkpoints").iterdir())[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    resumed = newest_checkpoint(run_dir / "checkpoints")
    assert resumed is not None
    assert resumed.step < STEPS
    train_on(1, config, tiny_data, run_dir)
    ours, theirs = losses(run_dir), losses(control)
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSMITH_STATE", str(tmp_path_factory.mktemp("state")))
        head = start_head(
            HeadConfig(name="training", num_cpus=2, gcs_port=0, dashboard_port=0, serve_port=0)
        )
        yield head
        stop_head(head)


def _train(
    session: Session, config: TrainConfig, folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return subprocess.run(
        [sys.executable, "-m", "jobs.train", "--config", str(path), *options],
        env={**os.environ, **session.environment(), "RAYSMITH_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.usefixtures("one_thread")
def test_launch_when_two_workers_train_gives_a_model_and_the_losses_of_one(
    session: Session, tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    done = _train(session, _config(tiny_corpus, 2, 4), tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    run_dir = tmp_path / "runs" / "tiny"
    assert outcome["num_workers"] == 2
    assert outcome["model_dir"] == str(run_dir / "model")
    assert f"step {STEPS}/{STEPS}" in done.stderr
    verify_directory(run_dir / "model")
    plan = json.loads((run_dir / "plan.json").read_text())
    assert plan["demand"]["num_workers"] == 2
    train_on(1, _config(tiny_corpus, 1, 8), tiny_data, tmp_path / "control")
    ours, theirs = losses(run_dir), losses(tmp_path / "control")
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4

    again = _train(session, _config(tiny_corpus, 2, 4), tmp_path, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == outcome


@pytest.mark.ray
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.paths=[no/such/*.txt]", "no file matches `no/such/*.txt`"),
        ("max_step=3", "did you mean `max_steps`?"),
        ("model.decoder.vocab_size=100", "vocab_size is 100"),
        ("scaling.cpus_per_worker=64", "64"),
        ("data.validation_fraction=0.0001", "the validation split has 0 documents"),
    ],
)
def test_launch_when_input_is_bad_exits_with_2_and_names_it(
    session: Session, tiny_corpus: str, tmp_path: Path, option: str, message: str
) -> None:
    options = ["--set", option]
    done = _train(session, _config(tiny_corpus, 1, 8), tmp_path, *options)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "runs" / "tiny" / "data").exists()
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()


@pytest.mark.ray
def test_launch_when_the_loss_is_no_number_fails_once_with_1(
    session: Session, tiny_corpus: str, tmp_path: Path
) -> None:
    options = ["--set", "optimizer.lr=1e30", "--set", "schedule.warmup_steps=0"]
    done = _train(session, _config(tiny_corpus, 1, 8), tmp_path, *options)
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.rindex("error:") :]
    assert "optimizer.lr=1e+30" in error
    assert done.stderr.count("Started training worker group") == 1


@pytest.mark.ray
def test_dry_run_when_asked_prints_the_plan_and_writes_nothing(
    session: Session, tiny_corpus: str, tmp_path: Path
) -> None:
    done = _train(session, _config(tiny_corpus, 2, 4), tmp_path, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows["planned for"] == "the running cluster"
    assert rows["steps"].startswith("50 of 128 tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
