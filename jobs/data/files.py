"""Files of a corpus: globs, plain paths and fsspec URLs turned into named, readable files.

Takes patterns; gives files in a fixed order. It does not know what is in them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from cluster.errors import DataError
from cluster.storage import home

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus; `name` is relative to the pattern that found it."""

    name: str
    path: str
    filesystem: Any

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open for reading bytes, decompressed by suffix; DataError if it cannot be read."""
        try:
            with fsspec.core.OpenFile(
                self.filesystem, self.path, mode="rb", compression=self._compression
            ) as file:
                yield file
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error

    @property
    def _compression(self) -> str | None:
        return fsspec.core.get_compression(self.path, "infer")


def find_files(patterns: Sequence[str]) -> list[SourceFile]:
    """Return the files that the patterns name, sorted and each once.

    A relative pattern starts from the current folder, or, where that has no match, from the folder
    of the cluster's outputs. Raises DataError for no patterns and for each without a file.
    """
    if not patterns:
        raise DataError("data.paths is empty. Name at least one file, glob or URL.")
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for file in _match(pattern):
            found.setdefault(file.path, file)
    return [found[path] for path in sorted(found)]


def _match(pattern: str) -> list[SourceFile]:
    tried = list(dict.fromkeys(_candidates(pattern)))
    for candidate in tried:
        if files := _expand(candidate):
            return files
    raise DataError(
        f"data.paths: no file matches `{pattern}` (looked for {', '.join(tried)}). "
        "Give an existing file, or a glob such as `texts/**/*.txt`."
    )


def _candidates(pattern: str) -> Iterator[str]:
    yield pattern
    if "://" not in pattern and not Path(pattern).is_absolute():
        yield str(home() / pattern)


def _expand(pattern: str) -> list[SourceFile]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if not _MAGIC & set(path):
            if not filesystem.isfile(path):
                return []
            return [SourceFile(PurePosixPath(path).name, path, filesystem)]
        root = _fixed_part(path)
        paths = [found for found in filesystem.glob(path) if filesystem.isfile(found)]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"data.paths: `{pattern}` cannot be listed: {error}") from error
    return [SourceFile(_relative(found, root), found, filesystem) for found in paths]


def _fixed_part(path: str) -> PurePosixPath:
    """Return the deepest folder of a glob that holds no wildcard."""
    fixed: list[str] = []
    for part in PurePosixPath(path).parts:
        if _MAGIC & set(part):
            break
        fixed.append(part)
    return PurePosixPath(*fixed)


def _relative(path: str, root: PurePosixPath) -> str:
    whole = PurePosixPath(path)
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else str(whole)
