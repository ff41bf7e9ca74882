"""Directories that are whole or absent: staging, digests, manifests, safe names, where outputs go.

Takes paths and bytes; gives directories published by one rename, with `manifest.json` written last
and checked before anything is read back. It does not know what the files mean.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import (
    ConfigError,
    IntegrityError,
    ModelFormatError,
    RaysmithError,
    StorageError,
    VersionExistsError,
)

MANIFEST = "manifest.json"
KIB, MIB, GIB = 2**10, 2**20, 2**30
_FULL_BELOW_BYTES = MIB
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space and run again.",
    errno.EDQUOT: "The disk quota is used up: free some space and run again.",
    errno.EACCES: "No permission: choose a folder you may write to.",
    errno.EROFS: "The file system is read-only: choose another folder.",
}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def home() -> Path:
    """Return the folder that relative output paths start from.

    `RAYSMITH_HOME`, which `raysmith up` sets to the folder it was called in; else the current
    folder. A Ray job without it runs in a temporary copy that Ray deletes, so that is an error.
    """
    configured = os.environ.get("RAYSMITH_HOME")
    if configured:
        return Path(configured)
    current = Path.cwd()
    if "working_dir_files" in current.parts:
        raise ConfigError(
            "a relative output path inside a Ray job would be deleted with the job's working "
            "folder. Give an absolute path, or set RAYSMITH_HOME on the cluster."
        )
    return current


def state_folder() -> Path:
    """Return the folder of what belongs to this user rather than to a project.

    `RAYSMITH_STATE`, else `~/.raysmith`: records of sessions, and the ledger unless another is set.
    """
    root = os.environ.get("RAYSMITH_STATE")
    return Path(root) if root else Path.home() / ".raysmith"


def resolve_output(path: str | Path) -> Path:
    """Return an absolute path; relative ones start from `home()`."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else home() / path


def find_input(path: str | Path) -> Path:
    """Return a given path where it exists, else the same below the folder of outputs."""
    return Path(path) if Path(path).exists() else resolve_output(path)


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it is safe as one path component, else raise ConfigError."""
    if not _SAFE_NAME.fullmatch(name):
        raise ConfigError(
            f"{what} `{name}` is not allowed: use letters, digits, `.`, `_` and `-`, "
            "starting with a letter or digit, at most 128 characters."
        )
    return name


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    It has `mode`, less the umask, from its first byte on: 0o600 for what only the owner may read.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path of its own whose file becomes `target` by one rename when the block succeeds.

    The file is synced before. On any failure nothing is left. Raises VersionExistsError if `target`
    exists, also if it came to be meanwhile.
    """
    if target.exists():
        raise _exists(target)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(f"writing {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staging
            _sync_file(staging)
            if target.exists():
                raise _exists(target)
            staging.rename(target)
            _sync_folder(target.parent)
        finally:
            staging.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document atomically."""
    write_atomic(path, _json_bytes(document))


@contextmanager
def staged_directory(
    target: Path, manifest: Mapping[str, Any], *, replace: bool = False
) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` by one rename when the block succeeds.

    On success every file is synced, `manifest.json` (the given values plus `files`, a digest and
    size for each) is written last, and the folder is renamed. On any failure nothing is left.
    Raises VersionExistsError if `target` exists and `replace` is false.
    """
    if target.exists() and not replace:
        raise _exists(target)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(f"writing {target}"):
        staging.mkdir(parents=True)
        try:
            yield staging
            write_manifest(staging, manifest)
            _rename_into_place(staging, target, replace=replace)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_manifest(directory: Path, values: Mapping[str, Any]) -> None:
    """Sync every file below `directory` and write its manifest with their digests, last."""
    files = {}
    for path in sorted(_files_of(directory)):
        _sync_file(path)
        files[path.relative_to(directory).as_posix()] = {
            "sha256": digest_file(path),
            "size_bytes": path.stat().st_size,
        }
    document = {**values, "files": files}
    document["self_sha256"] = _self_digest(document)
    for folder in (path for path in directory.rglob("*") if path.is_dir()):
        _sync_folder(folder)
    write_json(directory / MANIFEST, document)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a directory's manifest after checking the manifest's own digest (not the files')."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
        document = json.loads(data)
    except FileNotFoundError:
        raise ModelFormatError(
            f"{directory} has no {MANIFEST}: it was not published whole. "
            "Write it again, or give another directory."
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}. Restore it or publish again.") from None
    if (
        not isinstance(document, dict)
        or document.get("self_sha256") != _self_digest(document)
        or data != _json_bytes(document)  # a digest of values does not see a changed blank
    ):
        raise IntegrityError(
            f"{path} is damaged: its own digest differs. Restore it or publish again."
        )
    return document


def verify_directory(directory: Path) -> dict[str, Any]:
    """Return the manifest after checking every file's digest and that no file is missing or extra.

    Raises IntegrityError naming the first file that differs.
    """
    document = read_manifest(directory)
    recorded: dict[str, Any] = document["files"]
    present = {path.relative_to(directory).as_posix() for path in _files_of(directory)}
    if extra := sorted(present - recorded.keys()):
        raise IntegrityError(f"{directory / extra[0]} is not in the manifest. Remove the file.")
    for name, entry in recorded.items():
        path = directory / name
        if name not in present:
            raise IntegrityError(f"{path} is missing. Restore it or publish again.")
        if digest_file(path) != entry["sha256"]:
            raise IntegrityError(
                f"{path} is damaged: its SHA-256 differs from the manifest. "
                "Restore it or publish again."
            )
    return document


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn operating system errors into StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError):
            raise
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise StorageError(f"{action} failed: {error}. {remedy}".strip()) from error


@contextmanager
def library_storage_errors(action: str, folder: Path) -> Iterator[None]:
    """Turn errors of a library that writes below `folder` into StorageError, where they are that.

    Libraries in other languages lose the system's error on the way: those in Rust keep its number
    in the text, others raise what they like, and only the disk tells that it is full.
    """
    with storage_errors(action):
        try:
            yield
        except (RaysmithError, OSError):
            raise
        except Exception as error:
            code = _system_error(error, folder)
            if code is None:
                raise
            raise OSError(code, os.strerror(code), str(folder)) from error


def _system_error(error: Exception, folder: Path) -> int | None:
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return errno.ENOSPC if shutil.disk_usage(folder).free < _FULL_BELOW_BYTES else None


def _exists(target: Path) -> VersionExistsError:
    return VersionExistsError(f"{target} exists and is never overwritten. Choose another name.")


def _json_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _self_digest(document: Mapping[str, Any]) -> str:
    body = {key: value for key, value in document.items() if key != "self_sha256"}
    return digest_bytes(json.dumps(body, sort_keys=True).encode())


def _rename_into_place(staging: Path, target: Path, *, replace: bool) -> None:
    if target.exists():
        if not replace:
            raise _exists(target)
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)
    _sync_folder(target.parent)


def _files_of(directory: Path) -> list[Path]:
    """Return every file below a directory but its manifest."""
    own = directory / MANIFEST
    return [path for path in directory.rglob("*") if path.is_file() and path != own]


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
