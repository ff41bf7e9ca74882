"""The model that compression is measured on: trained here, on the standard library's text.

Takes a seed; gives a model directory of 23 million parameters and the packed data it was trained
on, from `.bench/models` if they lie there and were trained so. Training goes on where it was
stopped; `python -m benchmarks.compression.subject --seeds 0 1 2` makes them beforehand, side by
side on a core each.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.serving.models import BENCH
from cluster.errors import ConfigError, TrainingError
from cluster.storage import digest_file, read_manifest, verify_directory
from jobs.config import (
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
from jobs.data.prepare import prepare
from jobs.training.loop import run
from jobs.training.outcome import StepMetrics
from jobs.training.run_folder import differences, identity
from jobs.training.world import World

DECODER = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    max_seq_len=1024,
)
SEQ_LEN = 256
STEPS = 800  # 3.3 million tokens: the training split 1.13 times
_FOLDER = BENCH / "models" / "stdlib-23m"
_LINE_EVERY_STEPS = 25


@dataclass(frozen=True)
class Subject:
    """A trained model and its data."""

    seed: int
    model: Path
    data: Path
    config: TrainConfig

    def document(self) -> dict[str, Any]:
        """Return what the figures depend on: how the model was trained, and digests of it."""
        decides = json.dumps(identity(self.config), sort_keys=True)
        metrics = read_manifest(self.model)["metrics"]
        return {
            "seed": self.seed,
            "folder": self.model.parent.name,
            "steps": metrics["steps"],
            "tokens": metrics["tokens"],
            "validation_loss": metrics["validation_loss"],
            "config_sha256": hashlib.sha256(decides.encode()).hexdigest(),
            "data_sha256": read_manifest(self.data)["self_sha256"],
            "model_sha256": digest_file(self.model / "model.safetensors"),
        }


def training(seed: int, decoder: DecoderConfig = DECODER, max_steps: int = STEPS) -> TrainConfig:
    """Return how a model is trained: 16 sequences a step, 3.3 million tokens by default."""
    return TrainConfig(
        name=f"seed-{seed}" if max_steps == STEPS else f"seed-{seed}-{max_steps}-steps",
        model=ModelConfig(decoder=decoder),
        data=DataConfig(validation_fraction=0.05, test_fraction=0.08),
        tokenizer=TokenizerConfig(vocab_size=decoder.vocab_size),
        optimizer=OptimizerConfig(lr=0.0015),
        schedule=ScheduleConfig(
            kind="onecycle", warmup_steps=min(100, max_steps // 5), final_lr_ratio=0.02
        ),
        seq_len=SEQ_LEN,
        global_batch_size=16,
        micro_batch_size=8,
        max_steps=max_steps,
        eval_every_steps=200,
        compile=True,
        checkpoint_every_steps=50,
        seed=seed,
    )


def subjects(seeds: Sequence[int], steps: int = STEPS) -> list[Subject]:
    """Return the models of some seeds; those that were not trained before are now, side by side.

    Each has one core: two models on two cores take 0.6 of the time that one after the other takes
    on both (AVX-512 with AMX, 2026-11-30).
    """
    configs = {seed: training(seed, max_steps=steps) for seed in seeds}
    prepare(configs[seeds[0]], _FOLDER / "data")
    missing = [seed for seed in seeds if not (_FOLDER / configs[seed].name / "model").is_dir()]
    if len(missing) > 1:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as cores:
            list(cores.map(lambda seed: _train_on_one_core(seed, steps), missing))
    return [subject(seed, steps) for seed in seeds]


def subject(seed: int, steps: int = STEPS) -> Subject:
    """Return the model of a seed, trained now if it was not before."""
    config = training(seed, max_steps=steps)
    data = prepare(config, _FOLDER / "data").folder
    model = train(config, data, _FOLDER / config.name)
    return Subject(seed, model, data, config)


def _train_on_one_core(seed: int, steps: int) -> None:
    command = [sys.executable, "-m", "benchmarks.compression.subject"]
    ended = subprocess.run(
        [*command, "--seeds", str(seed), "--steps", str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if ended.returncode:
        raise TrainingError(f"the model of seed {seed} was not trained (exit {ended.returncode}).")


def train(config: TrainConfig, data: Path, folder: Path) -> Path:
    """Train in this process, going on where an earlier call stopped; return the model directory.

    A model that is there already is taken, if it was trained just so: else raises ConfigError.
    """
    model = folder / "model"
    if model.is_dir():
        _check_trained_so(config, data, folder, verify_directory(model)["lineage"])
        return model
    console = Console(stderr=True)

    def tell(step: StepMetrics) -> None:
        if step.step % _LINE_EVERY_STEPS == 0:
            console.print(
                f"{folder.name}: step {step.step} of {config.max_steps}, loss {step.loss:.3f}, "
                f"{step.tokens_per_s:,.0f} tokens/s",
                highlight=False,
            )

    folder.mkdir(parents=True, exist_ok=True)
    return run(config, data, folder, World(), tell).model_dir


def _check_trained_so(
    config: TrainConfig, data: Path, folder: Path, lineage: dict[str, Any]
) -> None:
    asked = {**identity(config), "data_sha256": read_manifest(data)["self_sha256"]}
    found = {**lineage["config"], "data_sha256": lineage["data_sha256"]}
    if changed := differences(found, asked):
        raise ConfigError(
            f"{folder} holds a model that was trained otherwise: {'; '.join(changed)}. "
            "Delete that folder, and it is trained anew."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Train the models of some seeds; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression.subject")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which ones")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    asked = parser.parse_args(argv)
    for found in subjects(asked.seeds, asked.steps):
        print(found.model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
