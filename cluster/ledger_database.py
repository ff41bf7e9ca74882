"""How a ledger's database is opened, read and written.

Takes a URL; gives an SQLAlchemy engine whose tables exist and have this version, and transactions.
It does not know what the rows mean.

SQLite runs with a write-ahead log: gateways read while another process writes, and a commit syncs
the disk once instead of three times. `synchronous=FULL` makes that sync part of every commit, so
what was acknowledged survives a power cut. Writers begin with `BEGIN IMMEDIATE`: they wait for each
other at the start and never fail in the middle. The log needs shared memory, so the file must lie
on a local disk; over a network use PostgreSQL.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import ConfigError, LedgerError
from cluster.ledger_address import is_file
from cluster.ledger_schema import SCHEMA_VERSION, metadata, rotations, state
from cluster.storage import storage_errors

_BUSY_TIMEOUT_S = 15.0
_CREATE_LOCK = 0x5261_7973  # an arbitrary number that names our advisory lock in PostgreSQL
# For libpq, so that no call waits for a server that has gone or for an answer that never comes.
_SERVER_BOUNDS = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",  # ms
    "keepalives_idle": "10",
    "keepalives_interval": "3",
    "keepalives_count": "3",
}
_STATEMENT_TIMEOUT_MS = 15_000  # A writer waits for others as long as with SQLite.


def open_engine(url: URL) -> Engine:
    """Return an engine over a ledger of this version; a new one is made if there is none.

    Raises LedgerError if it cannot be opened or is newer.
    """
    with ledger_errors(url):
        engine = _sqlite_engine(url) if is_file(url) else _postgres_engine(url)
        try:
            _prepare(engine)
        except BaseException:
            engine.dispose()
            raise
    return engine


class LedgerFile:
    """The file of an open ledger, known by more than its path.

    Open connections go on with a file that another one has replaced, new ones do not: what they
    read and write would be of two ledgers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = self._find()

    def check(self) -> None:
        """Raise LedgerError unless the file is in its place. Takes a microsecond."""
        if self._find() != self._identity:
            raise LedgerError(
                f"the ledger {self.path} was replaced by another file while it was in use. Restart "
                "the cluster's gateway and steward: `raysmith down`, then `raysmith up`."
            )

    def _find(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)  # noqa: PTH116 - half the time of Path.stat, per request
        except OSError as error:
            raise LedgerError(f"the ledger {self.path} cannot be read: {error}.") from None
        return found.st_dev, found.st_ino


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Yield a connection inside a transaction that may write; it is committed at the end."""
    with (
        ledger_errors(engine.url),
        engine.connect().execution_options(is_writer=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that reads one state of the ledger, however many statements it takes."""
    # PostgreSQL gives each statement a state of its own by default; SQLite never does.
    options: dict[str, Any] = {} if is_file(engine.url) else {"isolation_level": "REPEATABLE READ"}
    with (
        ledger_errors(engine.url),
        engine.connect().execution_options(**options) as connection,
    ):
        yield connection


@contextmanager
def ledger_errors(url: URL) -> Iterator[None]:
    """Turn the database's errors into LedgerError that names the ledger, without a password."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        where = url.database if is_file(url) else url.render_as_string(hide_password=True)
        raise LedgerError(f"the ledger {where} cannot be used: {reason}. Check it.") from error


def _sqlite_engine(url: URL) -> Engine:
    assert url.database is not None, "ledger_url gives a path"
    path = Path(url.database)
    with storage_errors(f"making the ledger {path}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Only where there is no file yet: closing one that SQLite has open in this process would
        # drop SQLite's locks on it (see "How To Corrupt An SQLite Database File", 2.2).
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    _use_log(path)
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _use_log(path: Path) -> None:
    """Switch the file to a write-ahead log, once in its life."""
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error as error:
        raise LedgerError(
            f"{path} cannot be used as a ledger: {error}. Give the path of another file."
        ) from None


def _set_up_sqlite(connection: Any, record: Any) -> None:
    del record
    connection.isolation_level = None  # the driver begins nothing: `_begin_sqlite` does
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get("is_writer", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _postgres_engine(url: URL) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, pool_size=2, connect_args=_bounds(url))
    except ModuleNotFoundError:
        raise ConfigError(
            "a ledger in PostgreSQL needs psycopg. Run: pip install 'raysmith[postgres]'"
        ) from None


def _bounds(url: URL) -> dict[str, str]:
    """Return settings of a connection that bound every wait; what was set elsewhere is kept."""
    bounds = {name: value for name, value in _SERVER_BOUNDS.items() if name not in url.query}
    given = url.query.get("options") or os.environ.get("PGOPTIONS", "")
    others = given if isinstance(given, str) else " ".join(given)
    # The last one of a kind holds: another timeout that was given.
    options = f"-c statement_timeout={_STATEMENT_TIMEOUT_MS} {others}".rstrip()
    return {**bounds, "options": options}


def _prepare(engine: Engine) -> None:
    """Create the tables if there are none, else check that they are ours and of this version."""
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            lock = text("SELECT pg_advisory_xact_lock(:lock)")
            connection.execute(lock, {"lock": _CREATE_LOCK})
        if not inspect(connection).has_table(state.name):
            metadata.create_all(connection)
            row = {"id": 1, "version": SCHEMA_VERSION, "revision": 1}
            connection.execute(insert(state).values(row))
        found = connection.execute(select(state.c.version)).scalar_one()
        if found == SCHEMA_VERSION:
            # Ledgers made before it was kept have none; who does not know it needs it not.
            rotations.create(connection, checkfirst=True)
    if found > SCHEMA_VERSION:
        raise LedgerError(
            f"the ledger {engine.url.database} has version {found}; this Raysmith knows "
            f"versions up to {SCHEMA_VERSION}. Upgrade Raysmith, or give another ledger."
        )
