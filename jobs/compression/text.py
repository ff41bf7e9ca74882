"""Text that compression sees: token ids out of a prepared folder, of the model's own tokenizer.

Takes what was asked for and a model's directory; gives token ids, or says why they would mean
something else to this model. It does not know what they are used for.

N sequences, B sequences of a batch, T tokens
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import DataError
from cluster.storage import resolve_output
from jobs.config import CalibrationConfig, DecoderConfig
from jobs.data.prepare import TOKENIZER_FOLDER
from jobs.data.sampler import batch_indices
from jobs.data.tokens import TokenSplit, open_split

_TOKENIZER = "tokenizer.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextNeed:
    """How many different sequences of how many tokens a step trains on."""

    num_sequences: int
    seq_len: int


@dataclass(frozen=True)
class CalibrationText:
    """Token ids that go through a model to see what feeds its layers, and the text they are of."""

    tokens_NT: Tensor  # noqa: N815
    split: TokenSplit
    is_sequential: bool = True
    """Whether a block sees what those before it became; else what they were."""
    cache: Path | None = None
    """Where statistics of a model as it was are kept."""

    @classmethod
    def of(cls, tokens_NT: Tensor) -> "CalibrationText":
        """Return these ids as a whole text: what is trained on is cut from their rows in a line."""
        stream = tokens_NT.flatten().numpy()
        vocab_size = int(stream.max()) + 1
        return cls(tokens_NT, TokenSplit(Path("given ids"), "train", vocab_size, (stream,)))

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> Tensor:
        """Return int64 ids [batch_size, seq_len + 1] to train on: inputs and shifted targets.

        A pure function of its arguments; every sequence comes once before any comes again.
        """
        count = self.split.num_sequences(seq_len)
        indices = batch_indices(seed, step, batch_size, count)
        return torch.from_numpy(self.split.sequences(indices, seq_len))


def check_needs(split: TokenSplit, needs: Mapping[str, TextNeed]) -> None:
    """Raise DataError if there is less text than one of the steps, by name, trains on."""
    for place, need in needs.items():
        found = (split.num_tokens - 1) // need.seq_len
        if found < need.num_sequences:
            raise DataError(
                f"{place} trains on {need.num_sequences} sequences of {need.seq_len} tokens "
                f"({need.num_sequences * need.seq_len:,} tokens), and the {split.split} split in "
                f"{split.folder} has {found} ({split.num_tokens:,} tokens). Lower `num_tokens` or "
                "give more text."
            )


def read_text(config: CalibrationConfig, split: TokenSplit) -> CalibrationText:
    """Return `num_sequences` of `seq_len` ids, drawn from all over the split of `open_text`."""
    rows = split.sample(config.num_sequences, config.seq_len, config.seed)
    cache = None if config.cache is None else resolve_output(config.cache)
    tokens_NT = torch.from_numpy(rows[:, :-1].copy())
    return CalibrationText(tokens_NT, split, config.sequential, cache)


def open_text(config: CalibrationConfig, model: Path, shape: DecoderConfig) -> TokenSplit:
    """Return the training split of a prepared folder.

    Raises DataError for a folder that is no prepared data, too little of it, sequences longer than
    the model's positions, and ids of another tokenizer; IntegrityError for damaged files.
    """
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
    for path in (theirs, ours):
        if not path.is_file():
            _logger.warning(
                "%s does not exist: whether the ids of %s are the model's own cannot be told",
                path,
                split.folder,
            )
    if split.vocab_size > shape.vocab_size or not _is_same(theirs, ours):
        raise DataError(
            f"`calibration.data` = {split.folder} was tokenized by another tokenizer than the "
            f"model's ({ours}): its ids mean other text. Prepare the text with the model's."
        )
    return split


def _is_same(one: Path, other: Path) -> bool:
    """Say whether two tokenizers give a text the same ids, if both are there."""
    if not one.is_file() or not other.is_file():
        return True
    return _substance(one) == _substance(other)


def _substance(path: Path) -> dict[str, Any]:
    """Return what decides ids: not how texts are cut to length or padded."""
    try:
        document = json.loads(path.read_bytes())
        return {key: document.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged, so that the tokenizers of text and model cannot be compared: "
            f"{error}. Restore it."
        ) from None
