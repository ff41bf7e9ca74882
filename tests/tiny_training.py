"""A tiny model and corpus that train in seconds, and the processes that train them."""

import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing

from cluster.storage import staged_directory
from jobs.config import TrainConfig
from jobs.data.tokens import DATA_KIND, SPLITS
from jobs.training.loop import World, run
from jobs.training.metrics_file import read_metrics

_WORDS = ["def", "return", "value", "for", "index", "in", "range", "print", "list", "sum", "(", ")"]


def write_corpus(folder: Path, num_documents: int = 60) -> str:
    """Write text files of seeded words; return the glob that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for number in range(num_documents):
        words = generator.choices(_WORDS, k=120)
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + f" {number}\n")
    return str(folder / "*.txt")


def tiny_config(corpus: str, **changes: object) -> TrainConfig:
    """Return the config of a run that takes seconds; `changes` are top-level keys."""
    return TrainConfig.model_validate(
        {
            "name": "tiny",
            "model": {
                "decoder": {
                    "vocab_size": 320,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_layers": 2,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "max_seq_len": 32,
                }
            },
            "data": {
                "source": "text",
                "paths": [corpus],
                "validation_fraction": 0.15,
                "test_fraction": 0.15,
                "num_processes": 1,
            },
            "tokenizer": {"vocab_size": 300},
            "schedule": {"warmup_steps": 2},
            "seq_len": 16,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": 12,
            "precision": "fp32",
            "eval_every_steps": 6,
            "eval_sequences": 5,
            "checkpoint_every_steps": 3,
            **changes,
        }
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Return the recorded loss of each step; each step must have been recorded once."""
    entries = [entry for entry in read_metrics(run_dir) if "loss" in entry]
    found = {entry["step"]: entry["loss"] for entry in entries}
    assert len(found) == len(entries), "a step was recorded twice"
    return found


def train_on(num_workers: int, config: TrainConfig, data_dir: Path, run_dir: Path) -> None:
    """Train with plain processes and gloo, one thread each."""
    if num_workers == 1:
        run(config, data_dir, run_dir, World(), lambda _: None)
        return
    arguments = (num_workers, _free_port(), config, data_dir, run_dir)
    multiprocessing.spawn(_worker, arguments, nprocs=num_workers)


def _worker(
    rank: int, size: int, port: int, config: TrainConfig, data_dir: Path, run_dir: Path
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    run(config, data_dir, run_dir, World(rank, size), lambda _: None)
    distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_random_data(folder: Path, *, vocab_size: int, num_tokens: int) -> None:
    """Write packed data of random tokens, as many in every split; always the same ones."""
    generator = np.random.default_rng(0)
    splits: dict[str, Any] = {}
    manifest = {"kind": DATA_KIND, "dtype": "<u2", "vocab_size": vocab_size, "splits": splits}
    with staged_directory(folder, manifest) as staging:
        for split in SPLITS:
            name = f"{split}.bin"
            tokens = generator.integers(0, vocab_size, num_tokens).astype("<u2")
            (staging / name).write_bytes(tokens.tobytes())
            splits[split] = {"shards": [name], "num_tokens": num_tokens, "num_documents": 1}
