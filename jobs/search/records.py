"""A search's trials as other tools read them: an Optuna study, and TensorBoard's event files.

Takes a search's outcome; writes `optuna.db`, which optuna-dashboard opens, and `events/`, which
TensorBoard shows. Both are written anew from the journal's results, so they never disagree with it.
"""

import math
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from torch.utils.tensorboard import SummaryWriter

from cluster.storage import storage_errors
from jobs.search.plan import Search
from jobs.search.report import SearchOutcome, TrialRow

STUDY_FILE, EVENTS_FOLDER = "optuna.db", "events"
OBJECTIVES = ("perplexity_increase", "size_ratio", "latency_ratio")


def write_study(search: Search, outcome: SearchOutcome) -> None:
    """Write the study: one trial a candidate, its choices as parameters, the objectives as values.

    A candidate that left before the last rung is a pruned trial, one with an error a failed one.
    """
    path, staged = (search.run_dir / name for name in (STUDY_FILE, f"{STUDY_FILE}.new"))
    with storage_errors(f"writing {path}"):
        staged.unlink(missing_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name=search.config.name,
            storage=f"sqlite:///{staged}",
            directions=["minimize"] * len(OBJECTIVES),
        )
        with warnings.catch_warnings():  # They may change how names are set, not what they are.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(OBJECTIVES))
        study.set_user_attr("winner", outcome.winner)
        study.set_user_attr("why", outcome.why)
        study.add_trials([_trial(search, row, outcome) for row in outcome.trials if row.assignment])
        staged.replace(path)


def write_events(search: Search, outcome: SearchOutcome) -> None:
    """Write one series for each number of the trials, by candidate."""
    path, staged = (search.run_dir / name for name in (EVENTS_FOLDER, f"{EVENTS_FOLDER}.new"))
    with storage_errors(f"writing {path}"):
        shutil.rmtree(staged, ignore_errors=True)
        with SummaryWriter(str(staged)) as writer:
            for row in outcome.trials:
                for name, value in _numbers(row).items():
                    writer.add_scalar(f"trials/{name}", value, row.candidate)
            writer.add_text("why", outcome.why)
        shutil.rmtree(path, ignore_errors=True)
        staged.rename(path)


def _trial(search: Search, row: TrialRow, outcome: SearchOutcome) -> optuna.trial.FrozenTrial:
    names = [str(choice) for choice in search.space.choices]
    chosen = {
        group.title: names[choice]
        for group, choice in zip(search.space.groups, row.assignment, strict=True)
    }
    values = _values(row)
    state = TrialState.COMPLETE
    if row.error is not None:
        state = TrialState.FAIL
    elif row.rung + 1 < outcome.num_rungs or values is None:
        state = TrialState.PRUNED
    attributes: dict[str, Any] = {
        "summary": row.summary,
        "rung": row.rung,
        "on_front": row.on_front,
        **_numbers(row),
    }
    return optuna.trial.create_trial(
        state=state,
        values=values if state is TrialState.COMPLETE else None,
        params=chosen,
        distributions={name: CategoricalDistribution(names) for name in chosen},
        user_attrs={**attributes, "error": row.error},
    )


def _values(row: TrialRow) -> Sequence[float] | None:
    values = [getattr(row, name) for name in OBJECTIVES]
    return values if all(v is not None and math.isfinite(v) for v in values) else None


def _numbers(row: TrialRow) -> dict[str, float]:
    values = row.model_dump(exclude={"candidate", "recipe", "summary", "assignment", "error"})
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
