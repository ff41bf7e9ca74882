"""Parquet: one document a row.

Takes files, globs or URLs and the column that holds the text; gives that text, read in batches.
"""

from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from cluster.errors import DataError
from jobs.config import DataConfig
from jobs.data.document import Document
from jobs.data.files import SourceFile, find_files

_BATCH_ROWS = 1024


def documents(config: DataConfig) -> Iterator[Document]:
    """Yield each row of each file, named `file:row`; DataError names what is wrong."""
    for source in find_files(config.paths):
        try:
            yield from _rows(source, config.text_field)
        except pyarrow.ArrowException as error:
            raise DataError(f"{source.path} cannot be read as Parquet: {error}") from error


def _rows(source: SourceFile, column: str) -> Iterator[Document]:
    with source.open() as file:
        table = pyarrow.parquet.ParquetFile(file)
        _check_column(table.schema_arrow, column, source.path)
        number = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            for text in batch.column(0).to_pylist():
                if text is None:
                    raise DataError(f"{source.path}, row {number}: `{column}` is null.")
                yield Document(f"{source.name}:{number}", text)
                number += 1


def _check_column(schema: pyarrow.Schema, column: str, path: str) -> None:
    if column not in schema.names:
        raise DataError(
            f"{path}: no column `{column}`; there are: {', '.join(schema.names)}. "
            "Set data.text_field."
        )
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column `{column}` is {kind}, expected string.")
