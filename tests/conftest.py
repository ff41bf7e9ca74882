"""Fixtures that several kinds of tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads of several processes on the same cores spin for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from postgres import Server, running_server, why_not
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


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server of its own."""
    if reason := why_not():
        pytest.skip(reason)
    with running_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def any_ledger(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The path or URL of a ledger that does not exist yet."""
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAYSMITH_PEPPER", raising=False)
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    server: Server = request.getfixturevalue("postgres")
    return server.new_ledger()
