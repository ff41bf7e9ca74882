import errno
import json
from pathlib import Path

import pytest

from cluster import storage
from cluster.errors import (
    ConfigError,
    IntegrityError,
    ModelFormatError,
    StorageError,
    VersionExistsError,
)


def publish(target: Path, *, text: str = "weights") -> Path:
    with storage.staged_directory(target, {"kind": "test"}) as staging:
        (staging / "a").mkdir()
        (staging / "a" / "part.bin").write_text(text, encoding="utf-8")
        (staging / "config.json").write_text("{}", encoding="utf-8")
    return target


def test_staged_directory_when_block_succeeds_is_whole_and_verifies(tmp_path: Path) -> None:
    manifest = storage.verify_directory(publish(tmp_path / "model"))
    assert manifest["kind"] == "test"
    assert set(manifest["files"]) == {"a/part.bin", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_staged_directory_when_block_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with storage.staged_directory(tmp_path / "model", {}) as staging:
            (staging / "half").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_staged_directory_when_target_exists_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "model", text="first")
    with pytest.raises(VersionExistsError, match="never overwritten"):
        publish(tmp_path / "model", text="second")
    assert (tmp_path / "model" / "a" / "part.bin").read_text(encoding="utf-8") == "first"


def test_staged_directory_when_replacing_leaves_only_the_new(tmp_path: Path) -> None:
    publish(tmp_path / "model", text="first")
    with storage.staged_directory(tmp_path / "model", {}, replace=True) as staging:
        (staging / "new").write_text("second", encoding="utf-8")
    assert set(storage.verify_directory(tmp_path / "model")["files"]) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["a/part.bin", "config.json", "manifest.json"])
def test_verify_when_any_byte_is_damaged_names_the_file(tmp_path: Path, name: str) -> None:
    path = publish(tmp_path / "model") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        storage.verify_directory(tmp_path / "model")


def test_verify_when_manifest_value_is_changed_is_refused(tmp_path: Path) -> None:
    path = publish(tmp_path / "model") / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "kind": "other"}), encoding="utf-8")
    with pytest.raises(IntegrityError, match="own digest differs"):
        storage.verify_directory(tmp_path / "model")


def test_read_manifest_when_only_a_blank_is_changed_is_refused(tmp_path: Path) -> None:
    with storage.staged_directory(tmp_path / "m", {"rate": 1e-05}) as staging:
        (staging / "a").write_text("x")
    path = tmp_path / "m" / storage.MANIFEST
    whole = path.read_bytes()
    for damaged in (whole.replace(b"1e-05", b"1E-05"), whole[:-1] + b" "):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="damaged"):
            storage.read_manifest(tmp_path / "m")


def test_verify_when_a_file_is_missing_or_extra_is_refused(tmp_path: Path) -> None:
    target = publish(tmp_path / "model")
    (target / "extra").write_text("", encoding="utf-8")
    with pytest.raises(IntegrityError, match="extra is not in the manifest"):
        storage.verify_directory(target)
    (target / "extra").unlink()
    (target / "config.json").unlink()
    with pytest.raises(IntegrityError, match=r"config\.json is missing"):
        storage.verify_directory(target)


def test_read_manifest_when_absent_says_not_whole(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="not published whole"):
        storage.read_manifest(tmp_path)


def test_write_atomic_when_repeated_keeps_one_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    storage.write_atomic(path, b"one")
    storage.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "another folder")]
)
def test_storage_errors_when_the_disk_refuses_gives_the_remedy(code: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=remedy), storage.storage_errors("writing x"):
        raise OSError(code, "refused")


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a" * 129, "name with blank"])
def test_check_name_when_unsafe_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        storage.check_name(name)


def test_check_name_when_safe_returns_it() -> None:
    assert storage.check_name("tiny-v1.2_b") == "tiny-v1.2_b"


def test_resolve_output_when_relative_starts_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))
    assert storage.resolve_output("runs/x") == tmp_path / "runs" / "x"
    assert storage.resolve_output("/data/x") == Path("/data/x")


def test_home_when_inside_a_jobs_temporary_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "working_dir_files" / "pkg"
    folder.mkdir(parents=True)
    monkeypatch.delenv("RAYSMITH_HOME", raising=False)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="would be deleted"):
        storage.home()


def test_verify_when_a_manifest_in_a_subfolder_is_damaged_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with storage.staged_directory(target, {"kind": "model"}) as staging:
        (staging / "tokenizer").mkdir()
        (staging / "tokenizer" / storage.MANIFEST).write_text("{}")
    (target / "tokenizer" / storage.MANIFEST).write_text("[]")
    with pytest.raises(IntegrityError, match="tokenizer"):
        storage.verify_directory(target)
