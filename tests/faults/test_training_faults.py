"""`kill -9` in the middle of a run: it goes on, and its losses equal those of a control."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tiny_training import losses, tiny_config, train_on

from cluster.session import HeadConfig, Session, start_head, stop_head
from cluster.storage import verify_directory
from jobs.config import TrainConfig
from jobs.training.metrics_file import read_metrics
from jobs.training.run_folder import DRIVER_LOCK, WORKER_LOCK

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]

STEPS, KILL_AFTER, TIMEOUT_S = 600, 130, 90.0


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSMITH_STATE", str(tmp_path_factory.mktemp("state")))
        head = start_head(
            HeadConfig(name="faults", num_cpus=2, gcs_port=0, dashboard_port=0, serve_port=0)
        )
        yield head
        stop_head(head)


def _config(corpus: str, num_workers: int) -> TrainConfig:
    return tiny_config(
        corpus,
        max_steps=STEPS,
        micro_batch_size=4 // num_workers,
        checkpoint_every_steps=50,
        eval_every_steps=STEPS,
        scaling={"num_workers": num_workers},
    )


@pytest.fixture(scope="module")
def control(tiny_corpus: str, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("control")
    train_on(1, _config(tiny_corpus, 1), tiny_data, run_dir)
    return run_dir


class _Driver:
    """`python -m jobs.train` as a process of its own."""

    def __init__(self, session: Session, config: TrainConfig, folder: Path) -> None:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.run_dir = folder / "runs" / config.name
        self._log = folder / f"driver-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.train", "--config", str(path)],
                env={**os.environ, **session.environment(), "RAYSMITH_HOME": str(folder)},
                stdout=log,
                stderr=log,
            )

    def wait_for_step(self, step: int) -> None:
        _wait_until(lambda: self._newest_step() >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.log

    def finish(self) -> int:
        """Wait for the end; return the step the run last went on from."""
        assert self.process.wait(timeout=TIMEOUT_S) == 0, self.log
        return int(json.loads((self.run_dir / "summary.json").read_text())["resumed_from_step"])

    @property
    def log(self) -> str:
        return self._log.read_text()

    def _newest_step(self) -> int:
        entries = read_metrics(self.run_dir)
        return int(entries[-1]["step"]) if entries else 0

    def holder(self, lock: str) -> int:
        """Return the process that holds a lock: the driver, or the first worker."""
        found = re.match(r"process (\d+)", (self.run_dir / lock).read_text())
        assert found, f"{lock} names no process"
        return int(found[1])


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        pause.wait(0.02)


def _check(run_dir: Path, control: Path, tolerance: float) -> None:
    ours, theirs = losses(run_dir), losses(control)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) <= tolerance
    verify_directory(run_dir / "model")


def test_run_when_its_worker_is_killed_goes_on_bit_for_bit(
    session: Session, tiny_corpus: str, control: Path, tmp_path: Path
) -> None:
    driver = _Driver(session, _config(tiny_corpus, 1), tmp_path)
    driver.wait_for_step(KILL_AFTER)
    os.kill(driver.holder(WORKER_LOCK), signal.SIGKILL)
    assert driver.finish() >= 100
    assert driver.log.count("Started training worker group") == 2
    _check(driver.run_dir, control, tolerance=0.0)


def test_run_when_its_driver_is_killed_goes_on_bit_for_bit_with_the_same_command(
    session: Session, tiny_corpus: str, control: Path, tmp_path: Path
) -> None:
    config = _config(tiny_corpus, 1)
    first = _Driver(session, config, tmp_path)
    first.wait_for_step(KILL_AFTER)
    assert first.holder(DRIVER_LOCK) == first.process.pid
    first.process.kill()
    first.process.wait()
    second = _Driver(session, config, tmp_path)
    assert second.finish() >= 100
    _check(second.run_dir, control, tolerance=0.0)


def test_run_when_one_of_two_workers_is_killed_goes_on(
    session: Session, tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = _config(tiny_corpus, 2)
    train_on(2, config, tiny_data, tmp_path / "control")
    driver = _Driver(session, config, tmp_path)
    driver.wait_for_step(KILL_AFTER)
    os.kill(driver.holder(WORKER_LOCK), signal.SIGKILL)
    assert driver.finish() >= 100
    # Two workers add in a fixed order: their run repeats itself to the last bit too.
    _check(driver.run_dir, tmp_path / "control", tolerance=0.0)


def test_run_when_interrupted_exits_with_130_and_leaves_no_worker(
    session: Session, tiny_corpus: str, tmp_path: Path
) -> None:
    driver = _Driver(session, _config(tiny_corpus, 1), tmp_path)
    driver.wait_for_step(1)
    worker = driver.holder(WORKER_LOCK)
    driver.process.send_signal(signal.SIGINT)
    assert driver.process.wait(timeout=TIMEOUT_S) == 130, driver.log
    assert "run the same command again" in driver.log
    _wait_until(lambda: not psutil.pid_exists(worker))
