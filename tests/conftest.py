"""Fixtures that several kinds of tests share; being here, it also puts this folder on the path."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads of several processes on the same cores spin for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_training import tiny_config, write_corpus

from jobs.data.prepare import prepare


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A glob of small text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tiny_data(tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, prepared."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(tiny_config(tiny_corpus), folder).folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, as workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
