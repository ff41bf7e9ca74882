"""Carry out a search's tasks with Ray Tune.

Takes a prepared search and its journal; runs tasks until `course.decide` says it is over. It
decides nothing: our searcher hands Tune the wanted tasks one by one and writes down what comes
back. Tune's own checkpoints are not used, because the journal is enough to go on from.
"""

import contextlib
import json
import logging
import os
import sys
import uuid
from typing import Any

import torch
from ray import tune
from ray.tune.search import Searcher

from cluster.errors import RaysmithError
from jobs.search.course import Finish, Wanted
from jobs.search.journal import Journal
from jobs.search.plan import Search
from jobs.search.queue import TaskQueue
from jobs.search.trial import TrialSpec, run_trial

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and search.json hold everything
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output ignores verbose=0
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search; it goes on from the journal
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "60",
}


def run_tasks(search: Search, journal: Journal) -> Finish | Wanted:
    """Run what is left of a search on the connected cluster; return what comes next.

    A worker that dies is replaced once; a task that fails again counts as that candidate's error.
    Raises what a trial raised where it was no property of its recipe (damaged files, full disk).
    """
    config = search.config
    os.environ.update(_ENVIRONMENT)
    # It warns about every trial whose result files the loggers, switched off above, did not write.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    queue = TaskQueue(search, journal)
    attempt = f"attempt-{uuid.uuid4().hex[:8]}"
    tuner = tune.Tuner(
        tune.with_resources(_Trial, {"cpu": config.cpus_per_trial}),
        param_space={"num_threads": config.threads_per_trial},
        tune_config=tune.TuneConfig(
            search_alg=_QueueSearcher(queue),
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=_short_name,
            trial_dirname_creator=_short_name,
        ),
        run_config=tune.RunConfig(
            name=attempt,
            storage_path=str(search.run_dir / "tune"),
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):  # Tune prints tables; stdout is for data
        tuner.fit()
    return queue.end()


class _QueueSearcher(Searcher):
    """Tune's view of the queue."""

    def __init__(self, queue: TaskQueue) -> None:
        super().__init__()
        self._queue = queue

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's parameters, None to wait, or FINISHED."""
        if self._queue.is_over:
            return str(Searcher.FINISHED)
        spec = self._queue.take(trial_id)
        return None if spec is None else {"spec": spec.model_dump_json()}

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001 - Ray Tune's signature
    ) -> None:
        """Hand a trial's report to the queue."""
        self._queue.give(trial_id, None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the journal holds the state."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Keep nothing: the journal holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the journal holds the state."""


class _Trial(tune.Trainable):
    """One task in a worker process, which then takes the next one."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(config["num_threads"])
        self._spec = TrialSpec.model_validate_json(config["spec"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            # Not model_dump_json: that turns an infinite loss into null.
            found = {"result": json.dumps(run_trial(self._spec).model_dump(mode="json"))}
        except RaysmithError as error:
            found = {"fatal_class": type(error).__name__, "fatal": error.message}
        return {**found, "done": True}


def _short_name(trial: Any) -> str:
    return f"trial_{trial.trial_id}"
