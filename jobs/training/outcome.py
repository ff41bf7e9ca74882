"""What a step and a finished run report, as values. No torch, so that drivers import it lightly."""

from pathlib import Path

from cluster.config import StrictModel


class StepMetrics(StrictModel):
    """One optimizer step; `step` counts completed steps, so the first is 1."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    mfu: float | None


class TrainOutcome(StrictModel):
    """What a finished run gives."""

    run_dir: Path
    model_dir: Path
    steps: int
    train_loss: float
    validation_loss: float
    tokens: int
    tokens_per_s: float
    mfu: float | None
    num_workers: int
    resumed_from_step: int | None
