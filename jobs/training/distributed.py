"""The Ray side of a run: workers started, joined into one process group and watched by Ray Train.

Takes a config, prepared data and a folder; gives nothing but a run that ended, or its error. The
result is in the folder. It does not know plans or progress.
"""

import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.errors import RaysmithError, TrainingError
from jobs.config import TrainConfig
from jobs.training.loop import World, run
from jobs.training.run_folder import RAY_FOLDER

# Read by Ray Train when `fit` is called.
_RAY_SETTINGS = {
    # A failed or finished worker is noticed by this poll; its default is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # A worker that hangs is replaced after this long; its default is 10 minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    # Workers stay in the job's folder, where relative inputs are found.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def fit(config: TrainConfig, data_dir: Path, run_dir: Path) -> None:
    """Train on `config.scaling` workers; one that dies is replaced, up to `max_failures` times.

    Raises what the loop raised, TrainingError where workers died too often, KeyboardInterrupt
    after Ctrl-C, once the workers have ended.
    """
    for key, value in _RAY_SETTINGS.items():
        os.environ.setdefault(key, value)
    # Ray restores a run whose name it finds, from checkpoints that are not ours: start clean.
    shutil.rmtree(run_dir / RAY_FOLDER, ignore_errors=True)
    trainer = _trainer(config, data_dir, run_dir)
    with _keep_interrupt_handler():
        try:
            trainer.fit()
        except SystemExit:
            # Ray's handler of Ctrl-C ends the workers, then exits with 0 as if all were done.
            raise KeyboardInterrupt from None
        except train.TrainingFailedError as error:
            raise _translate(error, config) from error


def train_worker(settings: dict[str, Any]) -> None:
    """Run the loop in one Ray Train worker, whose process group Ray has initialised."""
    config = TrainConfig.model_validate(settings["config"])
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    context = train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    run(config, Path(settings["data_dir"]), Path(settings["run_dir"]), world, lambda _: None)


class StopAtKnownErrors(train.UserCallback):
    """End a run at an error that another attempt would only meet again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the workers' own error, which Ray Train does not retry."""
        for error in worker_exceptions.values():
            if known := known_error(error):
                raise known


def known_error(error: BaseException | None) -> RaysmithError | None:
    """Return the error that was raised on purpose within what Ray wrapped around it."""
    if error is None or isinstance(error, RaysmithError):
        return error
    wrapped = [
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),  # Ray Train's UserExceptionWithTraceback
        *getattr(error, "worker_failures", {}).values(),
    ]
    return next((known for part in wrapped if (known := known_error(part))), None)


def _trainer(config: TrainConfig, data_dir: Path, run_dir: Path) -> TorchTrainer:
    scaling = config.scaling
    has_gpus = scaling.gpus_per_worker > 0
    resources = {"CPU": scaling.cpus_per_worker}
    if has_gpus:
        resources["GPU"] = scaling.gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "data_dir": str(data_dir),
            "run_dir": str(run_dir),
        },
        # Checkpoints are coordinated over gloo also where gradients travel over NCCL.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if has_gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=has_gpus, resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=f"{config.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run_dir / RAY_FOLDER),
            failure_config=train.FailureConfig(max_failures=scaling.max_failures),
            callbacks=[StopAtKnownErrors()],
        ),
    )


@contextmanager
def _keep_interrupt_handler() -> Iterator[None]:
    """Put the caller's handler of Ctrl-C back, which Ray Train replaces for good."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)


def _translate(error: BaseException, config: TrainConfig) -> RaysmithError:
    known = known_error(error)
    if known is not None:
        return known
    reason = str(error).strip().splitlines()
    return TrainingError(
        f"training `{config.name}` failed after {config.scaling.max_failures} restarts: "
        f"{reason[-1] if reason else type(error).__name__} Run the same command to go on from the "
        "newest checkpoint, or raise scaling.max_failures."
    )
