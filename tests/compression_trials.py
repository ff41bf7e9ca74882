"""Tiny models on trial by the compression benchmark, with text that each is good at."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.compression.trial import Trial
from cluster.storage import staged_directory
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig
from jobs.models import decoder
from tests.tiny_models import decoder_config

# Groups of 128 inputs have to divide its layers.
SHAPE = decoder_config(
    vocab_size=64, hidden_size=128, intermediate_size=256, head_dim=32, max_seq_len=192
)
NUM_SEQUENCES = 24


def publish(path: Path, shape: DecoderConfig = SHAPE, seed: int = 0, **manifest: Any) -> Path:
    """Write a random model and its manifest."""
    with staged_directory(path, {"kind": "model", **manifest}) as staged:
        decoder.save(decoder.build(shape, seed), staged)
    return path


def likely_text(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return sequences that a model samples itself: whatever changes it makes it worse."""
    generator, model = torch.Generator().manual_seed(0), decoder.load(path)
    rows = torch.randint(SHAPE.vocab_size, (NUM_SEQUENCES, 1), generator=generator)
    with torch.inference_mode():
        for _ in range(16):
            shares = model(rows)[:, -1].softmax(dim=-1)
            rows = torch.cat([rows, torch.multinomial(shares, 1, generator=generator)], dim=1)
    return rows.numpy()


def calibration() -> CalibrationText:
    """Return random text."""
    generator = torch.Generator().manual_seed(1)
    return CalibrationText.of(torch.randint(SHAPE.vocab_size, (16, 32), generator=generator))


def open_trials(folder: Path, count: int = 2) -> list[Trial]:
    """Return random models' trials."""
    paths = [publish(folder / f"seed-{seed}", seed=seed) for seed in range(count)]
    return [Trial(path.name, path, likely_text(path), calibration(), print) for path in paths]
