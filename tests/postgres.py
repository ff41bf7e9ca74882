"""An ephemeral PostgreSQL server from the installed binaries, for tests of the ledger."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

START_TIMEOUT_S = 30


def find_binaries() -> Path | None:
    """Return the folder of initdb and postgres, or None."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def why_not() -> str | None:
    """Return why no server can be started here, or None if one can."""
    if find_binaries() is None:
        return "no PostgreSQL binaries (initdb, postgres) are installed"
    if os.geteuid() == 0 and _other_user() is None:
        return "PostgreSQL does not run as root, and there is no user `postgres` or `nobody`"
    return None


class Server:
    """A server on a Unix socket in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    @property
    def url(self) -> str:
        return f"postgresql://tester@/postgres?host={self.folder}"

    def new_ledger(self) -> str:
        """Return the URL of a new, empty schema: it takes no files, as a database would."""
        self._count += 1
        name = f"ledger_{self._count}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}".encode())
        return f"{self.url}&options=-csearch_path%3D{name}"

    def disconnect_all(self) -> None:
        """End every connection, as a restart of the server would."""
        query = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
        )
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(query)


@contextmanager
def running_server() -> Iterator[Server]:
    """Start a server, and stop it and remove its files at the end."""
    binaries = find_binaries()
    assert binaries is not None, "see why_not"
    # Not in pytest's folder: its parents are closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="rsm-pg-"))
    options = _run_as(folder)
    try:
        data = folder / "data"
        command = [binaries / "initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **options)
        settings = ["listen_addresses=", "fsync=off", f"unix_socket_directories={folder}"]
        flags = [part for setting in settings for part in ("-c", setting)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, *flags],
                stdout=log,
                stderr=log,
                cwd=folder,
                **options,
            )
        try:
            found = Server(folder)
            _wait(found, server)
            yield found
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(timeout=START_TIMEOUT_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(found: Server, server: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(found.url).close()
            return
        except psycopg.OperationalError:
            log = (found.folder / "log").read_text()
            assert server.poll() is None, log
            assert time.monotonic() < deadline_s, log
            time.sleep(0.05)


def _other_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


def _run_as(folder: Path) -> dict[str, Any]:
    """Return how to start a process that is not root, with `folder` for its own."""
    if os.geteuid() != 0:
        return {}
    user = _other_user()
    assert user is not None, "see why_not"
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
