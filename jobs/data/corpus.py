"""The documents of a corpus: read from a source, split by name, each text once.

Takes a DataConfig; gives documents, the split of each, and batches of texts. It does not know
tokens.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice

import jobs.data.sources
from cluster.errors import DataError
from jobs.config import DataConfig
from jobs.data.document import Document
from jobs.data.tokens import Split
from jobs.plugins import load_plugin

Batch = tuple[list[Split], list[str]]
_BATCH_CHARACTERS = 500_000


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Yield the documents of the configured source, at most `max_documents` of them."""
    source = load_plugin(jobs.data.sources, config.source, what="data source")
    return islice(source.documents(config), config.max_documents)


def split_of(name: str, config: DataConfig) -> Split:
    """Return the split of a document: a pure function of its name, the seed and the fractions."""
    digest = hashlib.blake2b(f"{config.split_seed}\0{name}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < config.test_fraction:
        return "test"
    if position < config.test_fraction + config.validation_fraction:
        return "validation"
    return "train"


def training_texts(config: DataConfig, limit_bytes: int) -> Iterator[str]:
    """Yield the train split's texts up to a size; held-out text must not shape the tokenizer."""
    num_bytes, is_empty = 0, True
    for document in read_documents(config):
        is_empty = False
        if num_bytes < limit_bytes and split_of(document.name, config) == "train":
            num_bytes += len(document.text.encode("utf-8", "surrogatepass"))
            yield document.text
        elif num_bytes >= limit_bytes:
            return
    if is_empty:
        raise DataError(
            f"data.source={config.source} gave no document. Check data.paths and that the files "
            "are not empty."
        )


class Deduplicator:
    """Tell exact copies of texts, which could otherwise land in two splits."""

    def __init__(self) -> None:
        self.num_duplicates = 0
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Say whether a text was not seen before, and count it if it was."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            self.num_duplicates += 1
            return False
        self._seen.add(digest)
        return True


def text_batches(config: DataConfig, deduplicator: Deduplicator) -> Iterator[Batch]:
    """Yield texts that are neither empty nor copies, with their splits, in batches."""
    splits: list[Split] = []
    texts: list[str] = []
    num_characters = 0
    for document in read_documents(config):
        if not document.text.strip() or not deduplicator.is_new(document.text):
            continue
        splits.append(split_of(document.name, config))
        texts.append(document.text)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield splits, texts
            splits, texts, num_characters = [], [], 0
    if texts:
        yield splits, texts
