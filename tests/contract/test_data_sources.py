"""Every data source that is found keeps the same promises."""

import inspect
import itertools
import json
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest

import jobs.data.sources
from cluster.errors import DataError
from jobs.config import DataConfig
from jobs.data.document import Document
from jobs.plugins import load_plugin, plugin_names

NAMES = plugin_names(jobs.data.sources)


@pytest.fixture(params=NAMES)
def source(request: pytest.FixtureRequest) -> tuple[str, ModuleType]:
    return request.param, load_plugin(jobs.data.sources, request.param, what="data source")


@pytest.fixture
def config(source: tuple[str, ModuleType], tmp_path: Path) -> DataConfig:
    """A corpus that the source can read: the interpreter's own, or a file of each format."""
    name = source[0]
    paths = {
        "text": tmp_path / "*.txt",
        "jsonl": tmp_path / "a.jsonl",
        "parquet": tmp_path / "a.parquet",
    }
    texts = ["first text", "second text"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    paths["jsonl"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), paths["parquet"])
    return DataConfig(source=name, paths=(str(paths[name]),) if name in paths else ())


def _first(module: ModuleType, config: DataConfig) -> list[Document]:
    return list(itertools.islice(module.documents(config), 20))


def test_sources_when_listed_include_those_promised() -> None:
    assert {"stdlib", "text", "jsonl", "parquet"} <= set(NAMES)


def test_source_when_read_twice_gives_the_same_named_texts(
    source: tuple[str, ModuleType], config: DataConfig
) -> None:
    found = _first(source[1], config)
    assert len(found) >= 2
    assert found == _first(source[1], config)
    assert all(isinstance(document, Document) and document.name for document in found)
    assert len({document.name for document in found}) == len(found)


def test_source_when_read_gives_names_without_this_machines_paths(
    source: tuple[str, ModuleType], config: DataConfig, tmp_path: Path
) -> None:
    for document in _first(source[1], config):
        assert not Path(document.name).is_absolute()
        assert str(tmp_path) not in document.name


def test_source_when_paths_are_wrong_raises_data_error(source: tuple[str, ModuleType]) -> None:
    wrong = DataConfig(source=source[0], paths=("no/such/file-*",))
    with pytest.raises(DataError):
        _first(source[1], wrong)


def test_source_when_inspected_documents_itself(source: tuple[str, ModuleType]) -> None:
    assert inspect.getdoc(source[1])
    assert inspect.getdoc(source[1].documents)
