import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cluster.errors import ConfigError, DataError
from jobs.config import DataConfig
from jobs.data.corpus import Deduplicator, read_documents, split_of, text_batches
from jobs.data.document import Document
from jobs.data.sources import jsonl, parquet, stdlib, text


def _config(source: str, *paths: Path | str, **changes: object) -> DataConfig:
    return DataConfig.model_validate(
        {"source": source, "paths": [str(p) for p in paths], **changes}
    )


def test_stdlib_when_read_gives_modules_but_no_tests_or_packages_of_others() -> None:
    found = {document.name: document.text for document in stdlib.documents(_config("stdlib"))}
    assert "class JSONDecoder" in found["json/decoder.py"]
    assert len(found) > 300
    assert not [name for name in found if "site-packages" in name or "/test/" in name]


def test_stdlib_when_paths_are_given_refuses_to_ignore_them() -> None:
    with pytest.raises(DataError, match=r"data\.paths"):
        next(stdlib.documents(_config("stdlib", "x.txt")))


def test_text_when_glob_matches_names_files_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b.txt").write_text("bé", encoding="utf-8")
    (tmp_path / "a" / "c.txt").write_text("c")
    found = list(text.documents(_config("text", tmp_path / "**/*.txt", tmp_path / "b.txt")))
    assert found == [Document("a/c.txt", "c"), Document("b.txt", "bé")]


def test_text_when_compressed_is_decompressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    assert [d.text for d in text.documents(_config("text", tmp_path / "*.gz"))] == ["hello"]


def test_text_when_path_is_a_url_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert [d.text for d in text.documents(_config("text", f"file://{tmp_path}/a.txt"))] == [
        "hello"
    ]


def test_text_when_not_utf8_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text \(byte 2\)"):
        list(text.documents(_config("text", tmp_path / "a.txt")))


@pytest.mark.parametrize("module", [text, jsonl, parquet])
def test_files_when_missing_or_not_given_are_refused(module: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*none-\*"):
        list(module.documents(_config("text", tmp_path / "none-*")))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"data\.paths is empty"):
        list(module.documents(_config("text")))  # type: ignore[attr-defined]


def test_jsonl_when_read_gives_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "x": 1}\n\n{"body": "two"}\n')
    found = list(jsonl.documents(_config("jsonl", path, text_field="body")))
    assert found == [Document("a.jsonl:1", "one"), Document("a.jsonl:3", "two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: not valid JSON"),
        ("[1]", r"expected an object, found list"),
        ('{"body": "x"}', r"no key `text`; there are: body"),
        ('{"text": 3}', r"`text` is int, expected a string"),
        ('{"text": "\\ud800"}', r"line 1: `text` holds half of a surrogate pair"),
    ],
)
def test_jsonl_when_a_line_is_wrong_names_it(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        list(jsonl.documents(_config("jsonl", tmp_path / "a.jsonl")))


def _write_parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_when_read_gives_each_row(tmp_path: Path) -> None:
    path = _write_parquet(tmp_path / "a.parquet", text=["one", "two"], other=[1, 2])
    found = list(parquet.documents(_config("parquet", path)))
    assert found == [Document("a.parquet:0", "one"), Document("a.parquet:1", "two")]


def test_parquet_when_column_is_wrong_says_what_there_is(tmp_path: Path) -> None:
    path = _write_parquet(tmp_path / "a.parquet", body=["one"], size=[1])
    with pytest.raises(DataError, match=r"no column `text`; there are: body, size"):
        list(parquet.documents(_config("parquet", path)))
    with pytest.raises(DataError, match=r"column `size` is int64, expected string"):
        list(parquet.documents(_config("parquet", path, text_field="size")))
    path = _write_parquet(tmp_path / "b.parquet", text=["one", None])
    with pytest.raises(DataError, match=r"row 1: `text` is null"):
        list(parquet.documents(_config("parquet", path)))


def test_parquet_when_file_is_not_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(parquet.documents(_config("parquet", tmp_path / "a.parquet")))


def test_reading_when_source_is_unknown_lists_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"no data source `jsonn`; there are: .*Did you mean"):
        read_documents(_config("jsonn"))


def test_reading_when_documents_are_limited_stops(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(9)))
    assert len(list(read_documents(_config("jsonl", path, max_documents=4)))) == 4


def test_split_when_asked_again_is_the_same_and_near_the_fractions() -> None:
    config = DataConfig(validation_fraction=0.2, test_fraction=0.1)
    names = [f"file-{number}" for number in range(5000)]
    splits = [split_of(name, config) for name in names]
    assert splits == [split_of(name, config) for name in names]
    assert splits.count("test") / 5000 == pytest.approx(0.1, abs=0.02)
    assert splits.count("validation") / 5000 == pytest.approx(0.2, abs=0.02)
    moved = config.replace(split_seed=1)
    assert splits != [split_of(name, moved) for name in names]


def test_batches_when_texts_repeat_or_are_blank_hold_each_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one", "two", "one", "  \n", "three"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    deduplicator = Deduplicator()
    batches = list(text_batches(_config("jsonl", path), deduplicator))
    assert [text for _, texts in batches for text in texts] == ["one", "two", "three"]
    assert deduplicator.num_duplicates == 1
