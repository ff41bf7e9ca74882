"""The folder of one run: who may write to it, and whether a config may go on in it.

Takes a TrainConfig and a folder; gives a lock and an identity. It does not know what is trained.

Layout: config.yaml, data/, checkpoints/, model/, tensorboard/, metrics.jsonl, plan.json,
summary.json, ray/.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from cluster import locks
from cluster.config import load_config
from cluster.errors import ConfigError, TrainingError
from cluster.storage import check_name, resolve_output, write_atomic
from jobs.config import TrainConfig

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
PLAN_FILE = "plan.json"
DATA_FOLDER = "data"
CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
RAY_FOLDER = "ray"
DRIVER_LOCK = ".driver.lock"
WORKER_LOCK = ".worker.lock"
# The workers of a driver that was just killed may need this long to end.
WORKER_LOCK_TIMEOUT_S = 60.0

# What may change between two attempts: it decides how a run is carried out, not what it computes.
_CHANGEABLE: dict[str, Any] = {
    "name": True,
    "output_dir": True,
    "scaling": True,
    "micro_batch_size": True,
    "compile": True,
    "log_every_steps": True,
    "eval_every_steps": True,
    "eval_sequences": True,
    "checkpoint_every_steps": True,
    "checkpoints_kept": True,
    "data": {"num_processes"},
}


def run_folder(config: TrainConfig) -> Path:
    """Return the folder of a run; ConfigError if its name is no safe folder name."""
    return resolve_output(config.output_dir) / check_name(config.name, "run name")


def identity(config: TrainConfig) -> dict[str, Any]:
    """Return, by dotted key, every value that must stay the same while a run is resumed."""
    return dict(_flatten(config.model_dump(mode="json", exclude=_CHANGEABLE), ""))


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Record the config of the current attempt."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomic(run_dir / CONFIG_FILE, text.encode())


def check_recorded(config: TrainConfig, run_dir: Path) -> None:
    """Raise ConfigError if the folder holds a run whose config differs where it may not."""
    path = run_dir / CONFIG_FILE
    if path.exists():
        check_identity(identity(load_config(TrainConfig, path)), identity(config), path)


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raise ConfigError listing every value that a run may not change once it has begun."""
    if changed := differences(before, now):
        raise ConfigError(
            f"{where} belongs to a run with another config: {'; '.join(changed)}. "
            "Choose another `name`, or restore these values to go on with that run."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a sentence's part for every value that was another before."""
    return [
        f"`{key}` was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run left half written; only while no other run writes here."""
    for pattern in (".*.tmp", ".*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def exclusive(
    path: Path, *, timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> AbstractContextManager[None]:
    """Return a lock file to hold; entering it raises TrainingError if another process does."""
    return locks.exclusive(path, "training", TrainingError, timeout_s=timeout_s, clock=clock)


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
