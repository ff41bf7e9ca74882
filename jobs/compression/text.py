"""Calibration text: token ids out of a prepared folder, of the tokenizer that the model has.

Takes what was asked for and a model's directory; gives token ids, or says why they would mean
something else to this model. It does not know what they are used for.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import DataError
from cluster.storage import resolve_output
from jobs.config import CalibrationConfig, DecoderConfig
from jobs.data.prepare import TOKENIZER_FOLDER
from jobs.data.tokens import TokenSplit, open_split

_TOKENIZER = "tokenizer.json"


def read_text(config: CalibrationConfig, model: Path, shape: DecoderConfig) -> Tensor:
    """Return int64 token ids [num_sequences, seq_len], drawn from all over the training split.

    Raises DataError for a folder that is no prepared data, too little of it, sequences longer than
    the model's positions, and ids of another tokenizer; IntegrityError for damaged files.
    """
    split = open_text(config, model, shape)
    rows = split.sample(config.num_sequences, config.seq_len, config.seed)
    return torch.from_numpy(rows[:, :-1].copy())


def open_text(config: CalibrationConfig, model: Path, shape: DecoderConfig) -> TokenSplit:
    """Return the training split after the checks of `read_text`."""
    split = open_split(resolve_output(config.data), "train")
    found = split.num_sequences(config.seq_len)
    if found < config.num_sequences:
        raise DataError(
            f"`calibration.num_sequences` = {config.num_sequences} sequences are asked for, and "
            f"{split.folder} has {found} of seq_len={config.seq_len}. Lower it or give more text."
        )
    if config.seq_len > shape.max_seq_len:
        raise DataError(
            f"`calibration.seq_len` = {config.seq_len} exceeds the model's {shape.max_seq_len} "
            "positions. Lower it."
        )
    theirs, ours = split.folder / TOKENIZER_FOLDER / _TOKENIZER, model / _TOKENIZER
    if split.vocab_size > shape.vocab_size or not _is_same(theirs, ours):
        raise DataError(
            f"`calibration.data` = {split.folder} was tokenized by another tokenizer than the "
            f"model's ({ours}): its ids mean other text. Prepare the text with the model's."
        )
    return split


def _is_same(one: Path, other: Path) -> bool:
    """Say whether two tokenizers give a text the same ids; a model without one cannot object."""
    if not one.is_file() or not other.is_file():
        return True
    return _substance(one) == _substance(other)


def _substance(path: Path) -> dict[str, Any]:
    """Return what decides ids: not how texts are cut to length or padded."""
    document = json.loads(path.read_text())
    return {key: document.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
