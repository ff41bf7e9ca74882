"""The running interpreter's standard library: real text that every machine has.

Takes nothing but the interpreter; gives one document a Python file. Tests are left out, because
distributions ship them or not and some hold broken encodings on purpose.
"""

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import DataError
from jobs.config import DataConfig
from jobs.data.document import Document

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)


def documents(config: DataConfig) -> Iterator[Document]:
    """Yield every module of the standard library, named by its path within the library.

    Raises DataError if `paths` is set, or if a file is not what Python itself could read.
    """
    if config.paths:
        raise DataError(
            f"data.source=stdlib reads the interpreter's own library; data.paths={config.paths} "
            "would be ignored. Remove data.paths, or use data.source=text."
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _LEFT_OUT & set(relative.parts):
            yield Document(relative.as_posix(), _read(path))


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Python source: {error}") from error
