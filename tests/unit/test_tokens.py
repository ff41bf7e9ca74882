from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError, IntegrityError, ModelFormatError
from cluster.storage import staged_directory
from jobs.data.shards import SplitWriter
from jobs.data.tokens import DATA_KIND, SPLITS, open_split, token_dtype

STREAM = np.arange(100, dtype="<u2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 tokens in documents of 7, in shards of about 20 bytes, the same in every split."""
    manifest: dict[str, object] = {"kind": DATA_KIND, "dtype": "<u2", "vocab_size": 100}
    with staged_directory(tmp_path / "data", manifest) as staging:
        summaries = {}
        for split in SPLITS:
            writer = SplitWriter(staging, split, "<u2", max_shard_bytes=20)
            for start in range(0, 100, 7):
                writer.add(STREAM[start : start + 7].tobytes())
            writer.close()
            summaries[split] = writer.summary()
        manifest["splits"] = summaries
    return tmp_path / "data"


def test_sequences_when_they_cross_shards_hold_the_stream(folder: Path) -> None:
    split = open_split(folder, "train")
    assert len(split.shards) > 5
    assert split.num_tokens == 100
    assert split.num_sequences(33) == 3
    rows = split.sequences([2, 0, 1], 33)
    assert rows.dtype == np.int64
    assert rows.tolist() == [list(range(66, 100)), list(range(34)), list(range(33, 67))]


@pytest.mark.parametrize("seq_len", [1, 9, 10, 49, 99])
def test_sequences_when_all_are_read_predict_every_token_once(folder: Path, seq_len: int) -> None:
    split = open_split(folder, "validation")
    count = split.num_sequences(seq_len)
    targets = split.sequences(np.arange(count), seq_len)[:, 1:]
    assert targets.flatten().tolist() == list(range(1, count * seq_len + 1))


def test_sequences_when_corpus_is_too_short_say_how_short(folder: Path) -> None:
    split = open_split(folder, "test")
    with pytest.raises(DataError, match=r"test split .* has 100 tokens; .* needs 101"):
        split.num_sequences(100)


def test_sequences_when_index_is_out_of_range_are_refused(folder: Path) -> None:
    split = open_split(folder, "train")
    with pytest.raises(IndexError, match="must be in"):
        split.sequences([3], 33)


def test_opening_when_any_byte_of_a_shard_differs_is_refused(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"train-00001\.bin is damaged"):
        open_split(folder, "train")
    assert open_split(folder, "validation").num_tokens == 100


def test_opening_when_a_shard_is_cut_off_is_refused_even_unverified(folder: Path) -> None:
    shard = folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(IntegrityError, match="damaged"):
        open_split(folder, "train", verify=False)


def test_opening_when_a_shard_is_missing_is_refused(folder: Path) -> None:
    (folder / "test-00000.bin").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        open_split(folder, "test")


def test_opening_when_the_manifest_is_damaged_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 100', '"vocab_size": 101'))
    with pytest.raises(IntegrityError, match="manifest"):
        open_split(folder, "train")


def test_opening_when_the_folder_is_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_split(tmp_path / "none", "train")
    with pytest.raises(ModelFormatError, match="no manifest"):
        open_split(tmp_path, "train")
    with staged_directory(tmp_path / "model", {"kind": "model"}):
        pass
    with pytest.raises(DataError, match="holds `model`"):
        open_split(tmp_path / "model", "train")


@pytest.mark.parametrize(("vocab_size", "expected"), [(65_536, "<u2"), (65_537, "<u4")])
def test_token_dtype_when_vocabulary_grows_widens(vocab_size: int, expected: str) -> None:
    assert token_dtype(vocab_size).str == expected
