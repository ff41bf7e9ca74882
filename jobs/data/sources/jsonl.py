"""JSON Lines: one document a line.

Takes files, globs or URLs and the key that holds the text; gives that text.
"""

import json
from collections.abc import Iterator

from cluster.errors import DataError
from jobs.config import DataConfig
from jobs.data.document import Document
from jobs.data.files import find_files


def documents(config: DataConfig) -> Iterator[Document]:
    """Yield each line of each file, named `file:line`; DataError names a line that is wrong."""
    for source in find_files(config.paths):
        with source.open() as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{source.path}, line {number}"
                    text = _text_of(line, config.text_field, where)
                    yield Document(f"{source.name}:{number}", text)


def _text_of(line: bytes, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {type(record).__name__}.")
    if key not in record:
        raise DataError(
            f"{where}: no key `{key}`; there are: {', '.join(map(str, record)) or 'none'}. "
            "Set data.text_field."
        )
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: `{key}` is {type(text).__name__}, expected a string.")
    if not _is_unicode(text):
        raise DataError(
            f"{where}: `{key}` holds half of a surrogate pair, which is no character. "
            "Correct the text or leave the line out."
        )
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
