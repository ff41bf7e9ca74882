"""Config to trained model: plan, prepare data, train on the cluster, or go on where it stopped.

Takes a TrainConfig; gives its outcome. It is the driver of a run: it computes nothing itself, and
imports Ray and torch only once the plan stands. It does not know the loop.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from cluster import session
from cluster.errors import ClusterError, IntegrityError
from cluster.hardware import load_catalogue
from cluster.inventory import Inventory, cluster_inventory, local_inventory
from cluster.planner import TrainingPlan, plan_training
from cluster.storage import find_input, verify_directory, write_json
from jobs.config import TrainConfig
from jobs.data.prepare import prepare
from jobs.plan import training_demand
from jobs.training.outcome import TrainOutcome
from jobs.training.progress import ProgressLine
from jobs.training.run_folder import (
    CHECKPOINTS_FOLDER,
    DATA_FOLDER,
    DRIVER_LOCK,
    PLAN_FILE,
    SUMMARY_FILE,
    WORKER_LOCK,
    WORKER_LOCK_TIMEOUT_S,
    check_recorded,
    exclusive,
    remove_unfinished,
    run_folder,
    write_config,
)

_LOCK_TIMEOUT_S = 1.0


def launch(config: TrainConfig) -> TrainOutcome:
    """Train a model on the running cluster; the same call again goes on after a kill.

    A run that is finished is returned as it is. Raises PlacementError with the numbers if it does
    not fit, ConfigError if its folder holds a run with another config, IntegrityError for damaged
    data, checkpoint or model, TrainingError if it failed or is running already.
    """
    run_dir = run_folder(config)
    session.connect()
    plan = make_plan(config, cluster_inventory())
    with exclusive(run_dir / DRIVER_LOCK, timeout_s=_LOCK_TIMEOUT_S):
        check_recorded(config, run_dir)
        if finished := _finished(config, run_dir):
            return finished
        _wait_for_orphans(run_dir)
        write_config(config, run_dir)
        write_json(run_dir / PLAN_FILE, plan.model_dump(mode="json"))
        data = prepare(config, run_dir / DATA_FOLDER)
        _train(config, data.folder, run_dir)
        return _read_outcome(run_dir)


def make_plan(config: TrainConfig, inventory: Inventory) -> TrainingPlan:
    """Return what a run needs on these machines; PlacementError if it does not fit."""
    return plan_training(training_demand(config), inventory, load_catalogue())


def plan_rows(config: TrainConfig) -> Sequence[tuple[str, str]]:
    """Return the plan as rows to print: for the running cluster, else for this machine."""
    try:
        session.connect()
        where, inventory = "the running cluster", cluster_inventory()
    except ClusterError as error:
        where = f"this machine, since no cluster is joined: {error.message}"
        inventory = local_inventory()
    rows = make_plan(config, inventory).table()
    return [("planned for", where), *((name, value) for name, value in rows)]


def _wait_for_orphans(run_dir: Path) -> None:
    """Wait until the workers of a killed driver have ended, then clear what they left half done."""
    with exclusive(run_dir / WORKER_LOCK, timeout_s=WORKER_LOCK_TIMEOUT_S):
        for folder in (run_dir, run_dir / CHECKPOINTS_FOLDER):
            remove_unfinished(folder)


def _train(config: TrainConfig, data_dir: Path, run_dir: Path) -> None:
    # Deferred: torch and Ray take seconds to import, and bad input should not wait for them.
    from jobs.training.checkpoint import newest_checkpoint
    from jobs.training.distributed import fit

    newest_checkpoint(run_dir / CHECKPOINTS_FOLDER)  # refuses a damaged one before workers start
    with ProgressLine(run_dir, max_steps=config.max_steps, log_every_steps=config.log_every_steps):
        fit(_with_absolute_inputs(config), data_dir, run_dir)


def _with_absolute_inputs(config: TrainConfig) -> TrainConfig:
    """Return a config whose inputs are found from any folder.

    Paths within a job's own copy of the working folder stay as they are: each worker has that copy,
    and its place differs from one submission to the next.
    """
    given = config.model.init_from
    if given is None:
        return config
    found = find_input(given).absolute()
    if "working_dir_files" in found.parts:
        return config
    return config.replace(model=config.model.replace(init_from=str(found)))


def _finished(config: TrainConfig, run_dir: Path) -> TrainOutcome | None:
    if not (run_dir / SUMMARY_FILE).exists():
        return None
    outcome = _read_outcome(run_dir)
    if outcome.steps != config.max_steps or not outcome.model_dir.exists():
        return None
    verify_directory(outcome.model_dir)
    return outcome


def _read_outcome(run_dir: Path) -> TrainOutcome:
    path = run_dir / SUMMARY_FILE
    try:
        return TrainOutcome.model_validate(json.loads(path.read_bytes()))
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}. Delete it and run again.") from error
