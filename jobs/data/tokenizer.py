"""Tokenizers: train a byte-level BPE, load one from a directory, check that it fits a model.

Takes text or a directory; gives a Hugging Face tokenizer. It does not know models beyond the size
of their vocabulary.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cluster.errors import TokenizerError
from cluster.storage import storage_errors

BEGIN, END = "<|begin|>", "<|end|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# A base model has no trained roles: a chat is shown to it as plain text.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE on `texts` and write it as a Hugging Face tokenizer directory.

    Id 0 is <|begin|>, put before every encoded text; id 1 is <|end|>. A small corpus may give
    fewer than `vocab_size` tokens, never more. Raises TokenizerError if `vocab_size` cannot hold
    the 256 bytes or if there is no text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise TokenizerError(
            f"tokenizer.vocab_size={vocab_size} is too small for a byte-level BPE; it needs at "
            f"least {len(alphabet) + 2} (256 bytes and 2 special tokens)."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.num_characters:
        raise TokenizerError(
            "there is no text to train a tokenizer on. Give data that is not empty."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    _write(tokenizer, directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a Hugging Face directory; nothing is fetched or executed.

    Raises TokenizerError if tokenizer.json is missing or damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path} does not exist. Give a directory with a tokenizer.json, "
            "or leave tokenizer.path unset to train one."
        )
    try:
        # Not AutoTokenizer: it may rebuild the tokenizer from the model's type instead of the file.
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise TokenizerError(f"{path} cannot be loaded: {error}") from error


def check_fits(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Raise TokenizerError unless every token id has a row in an embedding of `vocab_size`."""
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise TokenizerError(
            f"the tokenizer has {needed} tokens and the model's vocab_size is {vocab_size}. "
            f"Set model.decoder.vocab_size to at least {needed}, or use a smaller tokenizer."
        )


def end_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that ends a document; TokenizerError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name_or_path} has no eos_token, which marks the end of a "
            "document. Set it in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from one directory into another that exists."""
    with storage_errors(f"copying the tokenizer to {target}"):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


class _Counted:
    """Pass texts through and count their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.num_characters = 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.num_characters += len(text)
        return text


def _write(tokenizer: Tokenizer, directory: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    with storage_errors(f"writing the tokenizer to {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
