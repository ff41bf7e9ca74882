import io
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from rich.console import Console
from tiny_training import tiny_config

from cluster.errors import ConfigError, TrainingError
from jobs.training.progress import ProgressLine
from jobs.training.run_folder import (
    check_recorded,
    exclusive,
    identity,
    run_folder,
    write_config,
)


def _hold(path: Path, pipe: Connection) -> None:
    with exclusive(path, timeout_s=5.0):
        pipe.send("held")
        pipe.recv()


def test_lock_when_another_process_holds_it_names_that_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path / ".lock", theirs))
    process.start()
    assert ours.recv() == "held"
    message = rf"another process \(process {process.pid} on"
    with pytest.raises(TrainingError, match=message), exclusive(tmp_path / ".lock", timeout_s=0.0):
        pass
    process.kill()
    process.join()
    with exclusive(tmp_path / ".lock", timeout_s=5.0):
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": {"num_workers": 2}, "micro_batch_size": 2},
        {"checkpoint_every_steps": 50, "checkpoints_kept": 5},
        {"log_every_steps": 1, "eval_every_steps": 1, "compile": True},
    ],
)
def test_identity_when_only_the_way_it_runs_differs_is_the_same(changes: dict[str, object]) -> None:
    assert identity(tiny_config("x")) == identity(tiny_config("x", **changes))


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"precision": "bf16"}, {"optimizer": {"lr": 1.0}}, {"max_steps": 13}]
)
def test_identity_when_what_is_computed_differs_is_another(changes: dict[str, object]) -> None:
    assert identity(tiny_config("x")) != identity(tiny_config("x", **changes))


def test_recorded_config_when_it_differs_is_named(tmp_path: Path) -> None:
    check_recorded(tiny_config("x"), tmp_path)
    write_config(tiny_config("x"), tmp_path)
    check_recorded(tiny_config("x", micro_batch_size=2), tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml .*`seed` was 0 and is now 5"):
        check_recorded(tiny_config("x", seed=5), tmp_path)


def test_run_folder_when_the_name_leaves_the_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run name `\.\./x` is not allowed"):
        run_folder(tiny_config("x", name="../x"))


def test_progress_when_a_run_ends_shows_its_last_step(tmp_path: Path) -> None:
    line = '{"step": 40, "loss": 2.5, "lr": 1, "grad_norm": 1, "tokens_per_s": 1234.5, "mfu": 0.25}'
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    with ProgressLine(tmp_path, max_steps=40, log_every_steps=10, console=console):
        text = line + '\n{"step": 40, "validation_loss": 2.4}\n{"step": 41, "lo'
        (tmp_path / "metrics.jsonl").write_text(text)
    assert out.getvalue() == "step 40/40  loss 2.5000  1,234 tokens/s  25.0% of peak\n"


def test_progress_when_nothing_was_trained_shows_nothing(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    with ProgressLine(tmp_path, max_steps=40, log_every_steps=10, console=console):
        pass
    assert out.getvalue() == ""
