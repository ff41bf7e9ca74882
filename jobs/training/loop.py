"""The training loop: batches in, a trained model directory out.

Takes a config, prepared data, a folder and this worker's place among the workers; gives a model in
Hugging Face format, metrics and checkpoints. It knows torch.distributed, but neither Ray nor who
started the workers. Gradients are averaged over the global batch, so the number of workers and of
accumulation steps changes the result by rounding only.

B batch, T tokens, V vocabulary
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import TrainingError
from cluster.storage import write_json
from jobs.config import TrainConfig
from jobs.data.sampler import batch_indices
from jobs.training.checkpoint import Checkpoints
from jobs.training.export import export_model
from jobs.training.metrics import (
    MetricsLog,
    flops_per_token,
    peak_flops_per_s,
)
from jobs.training.optim import learning_rate, set_learning_rate
from jobs.training.outcome import StepMetrics, TrainOutcome
from jobs.training.precision import forward_context
from jobs.training.run_folder import (
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    SUMMARY_FILE,
    WORKER_LOCK,
    WORKER_LOCK_TIMEOUT_S,
    exclusive,
    identity,
)
from jobs.training.setup import Setup, set_up
from jobs.training.validation import validation_loss
from jobs.training.world import World

__all__ = ["StepMetrics", "TrainOutcome", "World", "run"]


def run(
    config: TrainConfig,
    data_dir: Path,
    run_dir: Path,
    world: World,
    on_step: Callable[[StepMetrics], None],
) -> TrainOutcome:
    """Train to `max_steps`, going on from the newest checkpoint in `run_dir`.

    Every worker calls it; with more than one the process group is initialised already. `on_step`
    is called on every worker after each step. Raises IntegrityError for a damaged checkpoint or
    shard, ConfigError if `run_dir` holds a run with another config, TrainingError if the loss is
    no longer a number.
    """
    with ExitStack() as stack:
        if world.is_first:
            stack.enter_context(exclusive(run_dir / WORKER_LOCK, timeout_s=WORKER_LOCK_TIMEOUT_S))
        world.barrier()
        setup = set_up(config, data_dir, world)
        checkpoints = Checkpoints(
            run_dir / CHECKPOINTS_FOLDER,
            world,
            identity=identity(config),
            num_kept=config.checkpoints_kept,
            is_async=setup.device.type == "cuda",
        )
        start = checkpoints.restore(setup.tensors())
        world.barrier()
        log = stack.enter_context(MetricsLog(run_dir, start)) if world.is_first else None
        progress = _Progress(config, setup, start, log)
        for step in range(start, config.max_steps):
            on_step(_one_step(setup, step, progress))
            _after_step(setup, step + 1, checkpoints, progress)
        checkpoints.finish()
        return _finish(setup, data_dir, run_dir, progress)


class _Progress:
    """Speed and losses of a run so far."""

    def __init__(
        self, config: TrainConfig, setup: Setup, start: int, log: MetricsLog | None
    ) -> None:
        self.start_step = start
        self.log = log
        self.last_loss = log.last_loss if log else math.nan
        self.validation: tuple[int, float] | None = None
        self.tokens_per_step = config.global_batch_size * config.seq_len
        self._durations_s: list[float] = []
        num_parameters = sum(parameter.numel() for parameter in setup.model.parameters())
        decoder: Any = setup.model.config
        flops = flops_per_token(decoder, num_parameters, config.seq_len)
        peak = peak_flops_per_s(setup.precision, setup.device, setup.world)
        self._mfu_per_token_per_s = flops / peak if peak is not None else None

    def add(self, duration_s: float) -> None:
        """Count one step."""
        self._durations_s.append(duration_s)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the share of the machines' peak that a speed amounts to, if the peak is known."""
        if self._mfu_per_token_per_s is None:
            return None
        return tokens_per_s * self._mfu_per_token_per_s

    @property
    def tokens_per_s(self) -> float:
        """Speed of the median step: the first ones compile and warm up."""
        if not self._durations_s:
            return 0.0
        ordered = sorted(self._durations_s)
        return self.tokens_per_step / ordered[len(ordered) // 2]


def _one_step(setup: Setup, step: int, progress: _Progress) -> StepMetrics:
    config, optimizer = setup.config, setup.optimizer
    began = time.perf_counter()
    rate = learning_rate(step, config.max_steps, config.optimizer.lr, config.schedule)
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad(set_to_none=False)
    local_loss = _accumulate_gradients(setup, step)
    limit = config.optimizer.grad_clip
    norm = nn.utils.clip_grad_norm_(setup.model.parameters(), math.inf if limit is None else limit)
    loss = setup.world.sum(local_loss).item() / setup.world.size
    if not (math.isfinite(loss) and math.isfinite(norm.item())):
        raise TrainingError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {norm.item()}, with "
            f"optimizer.lr={config.optimizer.lr} and precision={setup.precision}. Lower "
            "optimizer.lr or lengthen schedule.warmup_steps, and choose another `name`."
        )
    optimizer.step()
    duration_s = time.perf_counter() - began
    tokens_per_s = progress.tokens_per_step / duration_s
    progress.add(duration_s)
    progress.last_loss = loss
    metrics = StepMetrics(
        step=step + 1,
        loss=loss,
        lr=rate,
        grad_norm=norm.item(),
        tokens_per_s=tokens_per_s,
        mfu=progress.mfu(tokens_per_s),
    )
    if progress.log:
        progress.log.step(metrics)
    return metrics


def _accumulate_gradients(setup: Setup, step: int) -> Tensor:
    """Add this worker's share of the step's gradients; return its mean loss."""
    config = setup.config
    indices = batch_indices(
        config.seed, step, config.global_batch_size, setup.train.num_sequences(config.seq_len)
    )
    mine = indices.reshape(config.accumulation_steps, setup.world.size, config.micro_batch_size)
    total = torch.zeros((), device=setup.device)
    for micro in range(config.accumulation_steps):
        rows = torch.from_numpy(
            setup.train.sequences(mine[micro, setup.world.rank], config.seq_len)
        ).to(setup.device)
        is_last = micro == config.accumulation_steps - 1
        with _without_exchange(setup.parallel, is_last=is_last):
            with forward_context(setup.precision, setup.device):
                logits_BTV = setup.parallel(rows[:, :-1])
            loss = functional.cross_entropy(logits_BTV.flatten(0, 1), rows[:, 1:].flatten())
            (loss / config.accumulation_steps).backward()
        total += loss.detach() / config.accumulation_steps
    return total


def _without_exchange(parallel: nn.Module, *, is_last: bool) -> Any:
    """Gradients travel once a step: with the last backward pass."""
    if isinstance(parallel, DistributedDataParallel) and not is_last:
        return parallel.no_sync()
    return nullcontext()


def _after_step(setup: Setup, step: int, checkpoints: Checkpoints, progress: _Progress) -> None:
    """Validate and save where it is time; `step` counts completed steps."""
    config = setup.config
    is_end = step == config.max_steps
    checkpoints.poll()
    if is_end or step % config.eval_every_steps == 0:
        _validate(setup, step, progress)
    if is_end or step % config.checkpoint_every_steps == 0:
        checkpoints.save(step, setup.tensors())


def _validate(setup: Setup, step: int, progress: _Progress) -> float:
    config = setup.config
    loss = validation_loss(
        setup.model,
        setup.validation,
        seq_len=config.seq_len,
        num_sequences=config.eval_sequences,
        batch_size=config.micro_batch_size,
        precision=setup.precision,
        world=setup.world,
    )
    progress.validation = (step, loss)
    if progress.log:
        progress.log.validation(step, loss)
    return loss


def _finish(setup: Setup, data_dir: Path, run_dir: Path, progress: _Progress) -> TrainOutcome:
    config = setup.config
    if progress.validation is None or progress.validation[0] != config.max_steps:
        _validate(setup, config.max_steps, progress)
    assert progress.validation is not None, "the run was just validated"
    outcome = TrainOutcome(
        run_dir=run_dir,
        model_dir=run_dir / MODEL_FOLDER,
        steps=config.max_steps,
        train_loss=progress.last_loss,
        validation_loss=progress.validation[1],
        tokens=config.max_steps * progress.tokens_per_step,
        tokens_per_s=progress.tokens_per_s,
        mfu=progress.mfu(progress.tokens_per_s),
        num_workers=setup.world.size,
        resumed_from_step=progress.start_step or None,
    )
    if setup.world.is_first:
        export_model(setup.model, config, data_dir, outcome)
        write_json(run_dir / SUMMARY_FILE, outcome.model_dump(mode="json"))
    setup.world.barrier()
    return outcome
