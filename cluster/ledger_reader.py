"""The ledger's teams and keys in memory, never older than the ledger.

Takes an open ledger; gives snapshots. Before each one it asks for the ledger's revision on an open
connection, so that a revoked key is refused by the next request; the rest is read again only when
that has changed. It writes nothing.
"""

import sqlite3
from typing import Any, Protocol
from urllib.parse import quote

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import LedgerError
from cluster.ledger import Ledger, Snapshot
from cluster.ledger_database import LedgerFile, ledger_errors

_QUERY = "SELECT revision FROM ledger"


class LedgerReader:
    """Snapshots of one ledger; used by one thread at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.is_local = ledger.file is not None
        self._source: _RevisionSource = (
            _ServerRevision(ledger) if ledger.file is None else _FileRevision(ledger.file)
        )
        self._snapshot = ledger.snapshot()

    @property
    def last(self) -> Snapshot:
        """The snapshot that was current at the last call of `current`."""
        return self._snapshot

    def current(self) -> Snapshot:
        """Return the teams and keys as they are now.

        Takes a few microseconds where `is_local`, else a round trip to the server. Raises
        LedgerError if the ledger cannot be read, or another file has taken its place.
        """
        if self._source.read() != self._snapshot.revision:
            self._snapshot = self._ledger.snapshot()
        return self._snapshot

    def close(self) -> None:
        """Close the connection."""
        self._source.close()


class _RevisionSource(Protocol):
    def read(self) -> int: ...

    def close(self) -> None: ...


class _FileRevision:
    """An SQLite file, asked without the layers above the driver."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        # Calls come from one thread at a time, but not always from the one that built this.
        self._connection = sqlite3.connect(
            f"file:{quote(str(file.path))}?mode=ro",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )

    def read(self) -> int:
        self._file.check()
        try:
            return int(self._connection.execute(_QUERY).fetchone()[0])
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger {self._file.path} cannot be read: {error}.") from None

    def close(self) -> None:
        self._connection.close()


class _ServerRevision:
    """A PostgreSQL server; a connection that broke is made anew."""

    def __init__(self, ledger: Ledger) -> None:
        self._engine: Engine = ledger.engine
        self._connection: Connection | None = None

    def read(self) -> int:
        with ledger_errors(self._engine.url):
            try:
                return self._ask()
            except SQLAlchemyError:
                self.close()  # the server was restarted, perhaps: one more try
                return self._ask()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _ask(self) -> int:
        if self._connection is None:
            connection = self._engine.connect()
            self._connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        row: Any = self._connection.exec_driver_sql(_QUERY).one()
        return int(row[0])
