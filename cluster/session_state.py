"""What is known of the sessions started on this machine, and where they listen.

Takes a name; gives the Session kept in `~/.raysmith/sessions/NAME.json` (or below
`RAYSMITH_STATE`), mode 0600. It does not start, join or stop anything.
"""

import contextlib
import fcntl
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from cluster import processes
from cluster.config import StrictModel
from cluster.errors import ClusterError, ConfigError
from cluster.storage import check_name, state_folder, storage_errors, write_atomic


class Session(StrictModel):
    """A head that was started here: where it listens and how it is recognised."""

    name: str = Field(description="Name it was started under.")
    pid: int = Field(description="The `ray start --block` process; it leads the head's group.")
    started_at_s: float = Field(description="When that process began, since the epoch.")
    head_id: str = Field(description="Marker in the environment of all of its processes.")
    address: str = Field(description="host:port that drivers connect to.")
    dashboard_url: str = Field(description="Jobs API and pages.")
    serve_url: str = Field(description="Where the gateway listens once something is served.")
    token_path: str = Field(description="File with the cluster's token, readable by its owner.")
    temp_dir: str = Field(description="Private folder of this session: token, log, Ray's files.")
    home: str = Field(description="Folder that relative output paths of its jobs start from.")

    @property
    def serve_port(self) -> int:
        """Port of the gateway."""
        return int(self.serve_url.rpartition(":")[2])

    @property
    def ray_dir(self) -> str:
        """Folder for Ray, which makes it writable for all; its parent keeps others out."""
        return str(Path(self.temp_dir) / "r")

    @property
    def log_path(self) -> Path:
        """Output of the head process."""
        return Path(self.temp_dir) / "head.log"

    @property
    def is_alive(self) -> bool:
        """Whether the head process of this session still runs."""
        began_s = processes.started_at_s(self.pid)
        return began_s is not None and abs(began_s - self.started_at_s) < 2.0

    def environment(self) -> dict[str, str]:
        """Return what a child process needs, on top of its environment, to reach this cluster."""
        hosts = [processes.LOOPBACK, "localhost", os.environ.get("NO_PROXY", "")]
        no_proxy = ",".join(
            dict.fromkeys(host for part in hosts for host in part.split(",") if host)
        )
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            "RAYSMITH_HOME": self.home,
            "RAYSMITH_SESSION": self.name,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def request(self, path: str, *, method: str = "GET", timeout_s: float = 5.0) -> Any:
        """Call the dashboard's HTTP API and return its JSON, or None if the answer has no body.

        Raises ClusterError if it cannot be reached or answers with an error.
        """
        url = self.dashboard_url + path
        try:
            token = Path(self.token_path).read_text(encoding="utf-8").strip()
            headers = {"Authorization": f"Bearer {token}"}
            request = urllib.request.Request(url, method=method, headers=headers)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=timeout_s) as response:
                body = response.read()
        except (urllib.error.URLError, OSError) as error:
            raise ClusterError(
                f"{method} {url} of session `{self.name}` failed: {error}. See `raysmith status`."
            ) from None
        return json.loads(body) if body else None


def find_session(name: str | None = None) -> Session:
    """Return the running session of this name, else raise ClusterError that lists what runs.

    Without a name: the session that this job runs on (`RAYSMITH_SESSION`), else `default`.
    """
    name = name or os.environ.get("RAYSMITH_SESSION", "default")
    session = load_session(name)
    if session is not None and session.is_alive:
        return session
    running = ", ".join(found.name for found in list_sessions()) or "none"
    raise ClusterError(
        f"no session `{name}` is running (running: {running}). Start one with `raysmith up`."
    )


def list_sessions() -> list[Session]:
    """Return the running sessions of this user on this machine, by name."""
    return [session for session in recorded_sessions() if session.is_alive]


def recorded_sessions() -> list[Session]:
    """Return every session of this user on this machine, also those whose head has died."""
    names = sorted(path.stem for path in _folder().glob("*.json"))
    return [found for name in names if (found := load_session(name)) is not None]


def load_session(name: str) -> Session | None:
    """Return what is recorded under a name, running or not (what died still needs `stop_head`)."""
    path = _path(check_name(name, "session name"))
    try:
        return Session.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise ConfigError(f"{path} is not a session file. Remove it; `raysmith up`.") from None


def save_session(session: Session) -> None:
    """Record a session under its name, readable by its owner only."""
    write_private(_path(session.name), session.model_dump_json(indent=2).encode())


def forget_session(session: Session) -> None:
    """Remove the record of this session, unless a newer one has its name."""
    recorded = load_session(session.name)
    if recorded is not None and recorded.head_id == session.head_id:
        _path(session.name).unlink(missing_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, at any moment."""
    with storage_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, data, mode=0o600)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a session's name, so that two starts do not interleave."""
    path = _folder() / f".{name}.lock"
    with storage_errors(f"locking {path}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _folder() -> Path:
    return state_folder() / "sessions"


def _path(name: str) -> Path:
    return _folder() / f"{name}.json"
