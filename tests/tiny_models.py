"""Tiny models: their shapes, and their directories as they are published."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.storage import write_manifest
from jobs.config import DecoderConfig
from jobs.data.tokenizer import train_tokenizer

TEXT = "def read_file(path): return path\n" * 20


def decoder_config(shape: str = "llama", **changes: Any) -> DecoderConfig:
    """A decoder of a family that is built in milliseconds."""
    values = {
        "shape": shape,
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.1,
    }
    return DecoderConfig.model_validate(values | changes)


def publish(directory: Path, save: Callable[[Path], object]) -> Path:
    """Write what `save` writes of a model with 300 tokens, its tokenizer and the manifest."""
    train_tokenizer([TEXT], 300, directory)
    save(directory)
    write_manifest(directory, {"kind": "model"})
    return directory
