"""Tokens per second of the training loop beside transformers' `Trainer`, on one model.

Takes text of the standard library; gives rates of both on equal initial weights, batches, precision
and optimizer, in turn and in one process. The losses of the last step are compared too: both do the
same work. The first steps of every run are left out of the time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from benchmarks._report import alternate, describe_case, run_benchmark
from cluster.errors import ConfigError
from jobs.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    Precision,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
from jobs.data.prepare import prepare
from jobs.data.sampler import batch_indices
from jobs.data.tokens import open_split
from jobs.models import decoder
from jobs.training.loop import run
from jobs.training.world import World

CLAIM = "Training: the loop beside transformers' Trainer"
BASELINE = "transformers Trainer"
OURS = "raysmith loop"
_SKIPPED_STEPS = 4

QUICK_MODEL = DecoderConfig()
FULL_MODEL = DecoderConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    max_seq_len=512,
)


@dataclass
class Clock:
    """Times of the ends of steps, and the loss of the last one."""

    tokens_per_step: int
    ends_s: list[float] = field(default_factory=list)
    last_loss: float = float("nan")

    def rate(self) -> float:
        """Return tokens per second after the skipped steps."""
        counted = self.ends_s[_SKIPPED_STEPS - 1 :]
        return (len(counted) - 1) * self.tokens_per_step / (counted[-1] - counted[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    transformers_logging.disable_progress_bar()
    return run_benchmark(CLAIM, "training", measure, argv)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration and every case of the benchmark."""
    rounds = 3 if arguments.quick else 5
    cases: list[tuple[Precision, bool]] = [("bf16", False)]
    if not arguments.quick:
        cases += [("fp32", False), ("bf16", True)]
    with tempfile.TemporaryDirectory(prefix="raysmith-bench-") as folder:
        config = _config(is_quick=arguments.quick, output_dir=folder)
        data_dir = Path(folder) / "data"
        prepare(config, data_dir)
        measured = [
            _measure_case(
                config.replace(precision=precision, compile=is_compiled), data_dir, rounds
            )
            for precision, is_compiled in cases
        ]
    described = config.model_dump(mode="json", exclude={"output_dir"})
    return {"config": {"train": described, "rounds": rounds}, "cases": measured}


def _config(*, is_quick: bool, output_dir: str) -> TrainConfig:
    model = QUICK_MODEL if is_quick else FULL_MODEL
    return TrainConfig(
        name="bench",
        output_dir=output_dir,
        model=ModelConfig(decoder=model),
        data=DataConfig(source="stdlib", max_documents=200),
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size, train_bytes=1_000_000),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=5, final_lr_ratio=0.0),
        seq_len=256 if is_quick else 512,
        global_batch_size=8,
        micro_batch_size=8,
        max_steps=12 if is_quick else 40,
        eval_every_steps=1000,
        eval_sequences=8,
        checkpoint_every_steps=1000,
    )


def _measure_case(config: TrainConfig, data_dir: Path, rounds: int) -> dict[str, Any]:
    losses: dict[str, float] = {}
    contenders: dict[str, Callable[[TrainConfig, Path, Clock], None]] = {
        OURS: _train_ours,
        BASELINE: _train_reference,
    }

    def timed(name: str) -> float:
        clock = Clock(config.global_batch_size * config.seq_len)
        contenders[name](config, data_dir, clock)
        losses[name] = clock.last_loss
        return clock.rate()

    rates = alternate({name: partial(timed, name) for name in contenders}, rounds, warmups=0)
    compiled = ", compiled" if config.compile else ""
    options = {"precision": config.precision, "compile": config.compile}
    described = describe_case(f"{config.precision}{compiled}", options, rates, BASELINE)
    described["last_losses"] = losses
    return described


def _train_ours(config: TrainConfig, data_dir: Path, clock: Clock) -> None:
    def on_step(metrics: Any) -> None:
        clock.ends_s.append(time.perf_counter())
        clock.last_loss = metrics.loss

    with tempfile.TemporaryDirectory(dir=config.output_dir) as run_dir:
        run(config, data_dir, Path(run_dir), World(), on_step)


def _train_reference(config: TrainConfig, data_dir: Path, clock: Clock) -> None:
    with tempfile.TemporaryDirectory(dir=config.output_dir) as folder:
        model_dir = Path(folder) / "initial"
        initial = decoder.build(config.model.decoder, config.seed)
        decoder.save(initial, model_dir, dtype=torch.float32)
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
            args=_arguments(config, folder),
            train_dataset=_Batches(config, data_dir),
            compute_loss_func=_cross_entropy,
            callbacks=[_ClockCallback(clock)],
        )
        trainer.remove_callback(PrinterCallback)
        clock.last_loss = _last_loss(trainer, config)


def _arguments(config: TrainConfig, folder: str) -> TrainingArguments:
    try:
        return TrainingArguments(
            output_dir=folder,
            max_steps=config.max_steps,
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.accumulation_steps,
            learning_rate=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            adam_beta1=config.optimizer.beta1,
            adam_beta2=config.optimizer.beta2,
            adam_epsilon=config.optimizer.eps,
            max_grad_norm=config.optimizer.grad_clip or 0.0,
            lr_scheduler_type="cosine",
            warmup_steps=config.schedule.warmup_steps,
            bf16=config.precision == "bf16",
            torch_compile=config.compile,
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=False,
        )
    except ImportError as error:
        raise ConfigError(f"transformers' Trainer cannot run: {error}") from None


class _Batches(Dataset[dict[str, torch.Tensor]]):
    """The sequences of every step in the loop's own order; labels are inputs one token later."""

    def __init__(self, config: TrainConfig, data_dir: Path) -> None:
        split = open_split(data_dir, "train")
        count = split.num_sequences(config.seq_len)
        batches = [
            split.sequences(
                batch_indices(config.seed, step, config.global_batch_size, count), config.seq_len
            )
            for step in range(config.max_steps)
        ]
        self._rows = torch.cat([torch.from_numpy(batch) for batch in batches])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index]
        return {"input_ids": row[:-1], "labels": row[1:]}


class _ClockCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Notes when each step ends."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.ends_s.append(time.perf_counter())


def _cross_entropy(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    return functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())


def _last_loss(trainer: Any, config: TrainConfig) -> float:
    trainer.train()
    losses = {
        entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    }
    return float(losses[config.max_steps])


if __name__ == "__main__":
    raise SystemExit(main())
