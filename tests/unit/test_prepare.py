import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_training import tiny_config

from cluster.errors import ConfigError, DataError, IntegrityError, TokenizerError
from jobs.data.corpus import split_of
from jobs.data.prepare import prepare
from jobs.data.tokenizer import load_tokenizer
from jobs.data.tokens import SPLITS, open_split


@pytest.fixture
def copy(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def _text(folder: Path, split: str) -> list[str]:
    """Decode a split and cut it at the marks between documents."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    stream = np.concatenate(open_split(folder, split).shards)  # type: ignore[arg-type]
    ends = np.flatnonzero(stream == tokenizer.eos_token_id)
    documents = np.split(stream, ends + 1)[:-1]
    assert all(document[0] == tokenizer.bos_token_id for document in documents)
    return [tokenizer.decode(document[1:-1]) for document in documents]


def test_prepared_data_when_decoded_is_the_corpus_each_document_in_one_split(
    tiny_data: Path, tiny_corpus: str
) -> None:
    config = tiny_config(tiny_corpus).data
    for split in SPLITS:
        expected = [
            path.read_text()
            for path in sorted(Path(tiny_corpus).parent.iterdir())
            if split_of(path.name, config) == split
        ]
        assert expected
        assert _text(tiny_data, split) == expected


def test_preparing_when_processes_differ_gives_the_same_bytes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    corpus = tmp_path_factory.mktemp("large")
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"number {number} of many words\n" * 2500)
    config = tiny_config(str(corpus / "*.txt"))
    parallel = config.replace(data=config.data.replace(num_processes=2))
    prepare(config, tmp_path / "one")
    prepare(parallel, tmp_path / "two")
    for path in sorted((tmp_path / "one").glob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_preparing_when_done_before_reuses_it(tiny_corpus: str, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    prepared = prepare(tiny_config(tiny_corpus), copy)
    assert prepared.num_tokens["train"] == open_split(copy, "train").num_tokens
    assert sum(prepared.num_documents.values()) == 60
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_preparing_when_prepared_otherwise_says_what_differs(tiny_corpus: str, copy: Path) -> None:
    config = tiny_config(tiny_corpus)
    other = config.replace(data=config.data.replace(split_seed=3))
    with pytest.raises(ConfigError, match=r"data\.split_seed=0 \(now 3\)"):
        prepare(other, copy)


def test_preparing_when_the_tokenizer_is_damaged_is_refused(tiny_corpus: str, copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is damaged"):
        prepare(tiny_config(tiny_corpus), copy)


def test_preparing_when_a_tokenizer_is_given_uses_it(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    origin = tiny_data / "tokenizer"
    config = tiny_config(tiny_corpus, tokenizer={"path": str(origin)})
    prepared = prepare(config, tmp_path / "data")
    name = "tokenizer.json"
    assert (prepared.tokenizer_folder / name).read_bytes() == (origin / name).read_bytes()


def test_preparing_when_the_tokenizer_does_not_fit_leaves_nothing(
    tiny_corpus: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_corpus)
    decoder = config.model.decoder.replace(vocab_size=100)
    small = config.replace(model=config.model.replace(decoder=decoder))
    with pytest.raises(TokenizerError, match="vocab_size is 100"):
        prepare(small, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_preparing_when_a_split_is_too_short_says_which(tiny_corpus: str, tmp_path: Path) -> None:
    config = tiny_config(tiny_corpus)
    decoder = config.model.decoder.replace(max_seq_len=2000)
    long = config.replace(model=config.model.replace(decoder=decoder), seq_len=2000)
    with pytest.raises(DataError, match=r"the validation split has \d+ documents with \d+ tokens"):
        prepare(long, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_preparing_when_files_are_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises((DataError, TokenizerError), match="no text"):
        prepare(tiny_config(str(tmp_path / "a.txt")), tmp_path / "data")


def test_preparing_when_the_source_has_no_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    config = tiny_config(str(tmp_path / "a.jsonl"))
    empty = config.replace(data=config.data.replace(source="jsonl"))
    with pytest.raises(DataError, match="gave no document"):
        prepare(empty, tmp_path / "data")
