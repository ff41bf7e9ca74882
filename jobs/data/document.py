"""What every source gives: named texts.

The name decides which split a document belongs to, so it must not depend on the machine.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text of a corpus and the name it is split by."""

    name: str
    text: str
