"""What a search asks its workers to measure, and what comes back. Values only."""

from collections.abc import Mapping
from typing import Literal

from cluster.config import StrictModel
from jobs.evaluation.gate import Checks
from jobs.evaluation.kernel_times import KernelTimes
from jobs.search.space import UNCHANGED, Assignment

# In this order: times of the kernels, each choice alone, rungs, requests of what is left, the gate,
# and Ray Serve.
Stage = Literal["times", "probe", "rung", "request", "gate", "serve"]
# While one of these runs no other task does: it measures time.
ALONE: tuple[Stage, ...] = ("times", "request", "gate")


class Task(StrictModel):
    """Measure one thing: a model on a rung, its requests, at the gate or served, or one group.

    A model is named by what is done to it, never by a number: whatever order candidates come in,
    a result belongs to what was measured.
    """

    stage: Stage
    assignment: Assignment = UNCHANGED
    group: int | None = None
    """At the stage `probe`: the group of layers whose choices are measured."""
    rung: int = 0


class Result(StrictModel):
    """What a task measured: mean losses in nats per token, one for every sequence.

    `error` says why a candidate could not be scored; its other fields are then empty.
    """

    losses: tuple[float, ...] = ()
    size_bytes: int = 0
    checks: Checks = Checks()
    faults: tuple[str, ...] = ()
    """Of the gate alone."""
    request_ms: float | None = None
    """A whole request of the workload, with the unchanged model's measured beside it."""
    base_request_ms: float | None = None
    num_requests: int | None = None
    """How many requests to each these are medians of, at the stage `serve`."""
    memory_bytes: int | None = None
    divergences: tuple[float, ...] = ()
    """Of each choice: mean divergence from the unchanged model's predictions, in nats."""
    times: KernelTimes | None = None
    seconds: float = 0.0
    error: str | None = None


Results = Mapping[Task, Result]
