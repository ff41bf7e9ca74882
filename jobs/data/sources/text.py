"""Plain text files: one document a file.

Takes files, globs or URLs; gives their text. It does not know what language it is.
"""

from collections.abc import Iterator

from cluster.errors import DataError
from jobs.config import DataConfig
from jobs.data.document import Document
from jobs.data.files import find_files


def documents(config: DataConfig) -> Iterator[Document]:
    """Yield each file that `config.paths` names; DataError if one is missing or not UTF-8."""
    for source in find_files(config.paths):
        with source.open() as file:
            data = file.read()
        try:
            yield Document(source.name, data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source.path} is not UTF-8 text (byte {error.start}). "
                "Convert it or leave it out of data.paths."
            ) from None
