"""Start, join and stop a Ray cluster; the only caller of `ray.init`.

Takes a HeadConfig or a running Session; gives a Session, which says where everything listens and
what a child process must have in its environment. A head is `ray start --head --block` in a
process group of its own, on the loopback address, with a token that only this user can read.
It does not know what runs on the cluster.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import processes
from cluster.errors import ClusterError, VersionMismatchError
from cluster.head import MARKER, HeadConfig, head_command, head_environment
from cluster.session_state import (
    Session,
    find_session,
    forget_session,
    list_sessions,
    load_session,
    locked,
    recorded_sessions,
    save_session,
    write_private,
)
from cluster.storage import check_name, home, storage_errors

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = [
    "HeadConfig",
    "Session",
    "connect",
    "find_session",
    "job_client",
    "join",
    "list_sessions",
    "load_session",
    "recorded_sessions",
    "start_head",
    "stop_head",
]

START_TIMEOUT_S = 60.0
_SERVE_SHUTDOWN_TIMEOUT_S = 6.0
_HEAD_GRACE_S = 8.0


def start_head(config: HeadConfig) -> Session:
    """Start a head node and return when it accepts drivers and jobs.

    Raises ClusterError if a session of this name runs or Ray does not start (with the end of its
    log), PortTakenError if a port is in use. On any failure nothing is left running.
    """
    check_name(config.name, "session name")
    with locked(config.name):
        if (old := load_session(config.name)) is not None:
            if old.is_alive:
                raise ClusterError(
                    f"session `{config.name}` already runs (pid {old.pid}, {old.dashboard_url}). "
                    f"Use it, stop it with `raysmith down --name {config.name}`, or start another "
                    "with `--name`."
                )
            stop_head(old)
        return _launch(config, _draft(config))


def stop_head(session: Session) -> None:
    """Stop a session: Serve first, then the head, then what is left of its own processes.

    Leaves no process and no temporary folder, and touches no process of anyone else. Raises
    ClusterError if a process cannot be ended.
    """
    if session.is_alive:
        with contextlib.suppress(ClusterError):  # the head is stopped whatever Serve answers
            _shut_serve_down(session)
    left = processes.end_tree(
        session.pid if session.is_alive else None,
        (MARKER, session.head_id),
        grace_s=_HEAD_GRACE_S,
    )
    if left:
        raise ClusterError(
            f"session `{session.name}`: {left} processes did not end. They carry "
            f"{MARKER}={session.head_id} in their environment; end them, then `raysmith down`."
        )
    shutil.rmtree(session.temp_dir, ignore_errors=True)
    forget_session(session)


def connect(session: Session | None = None) -> None:
    """Connect this process to a running cluster; does nothing if it is connected.

    Without a session: inside a Ray job that job's cluster, else `RAY_ADDRESS`, else the session
    `default`. Raises ClusterError, or VersionMismatchError, saying what was tried.
    """
    import ray  # deferred: its import takes a second, and only a driver needs it

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if session is None and address is None:
        session = find_session()
    if session is not None:
        _adopt(session)
        address = session.address
    assert address is not None, "find_session returns a session or raises"
    join(address)


def join(address: str) -> None:
    """Connect this process to the cluster at `host:port`, `ray://host:port` or `auto`."""
    import ray  # deferred, see `connect`

    where = address.removeprefix("ray://")
    if ":" in where and not processes.is_listening(where, timeout_s=5.0):
        raise ClusterError(
            f"no Ray cluster answers at {address}. Start one with `raysmith up`, or correct the "
            "address in RAY_ADDRESS."
        )
    try:
        ray.init(address=address, logging_level="WARNING", log_to_driver=True)
    except Exception as error:  # Ray's own errors have no common base
        raise translate_error(address, error) from error


def job_client(session: Session) -> "JobSubmissionClient":
    """Return Ray's own client for submitting, following and stopping jobs on this session."""
    _adopt(session)
    from ray.job_submission import JobSubmissionClient  # deferred, see `connect`

    try:
        return JobSubmissionClient(session.dashboard_url)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"the jobs API of session `{session.name}` does not answer at "
            f"{session.dashboard_url}: {error}. Run `raysmith status`."
        ) from error


def translate_error(address: str, error: Exception) -> ClusterError:
    """Return the error for what Ray said when it refused to join `address`."""
    text = str(error).strip()
    if "Version mismatch" in text:
        return VersionMismatchError(
            f"this process and the cluster at {address} differ. {text}\nUse the same Python and "
            "Ray on both sides: `raysmith down`, then `raysmith up` from this environment."
        )
    if "authentic" in text.lower() or "token" in text.lower():
        return ClusterError(
            f"the cluster at {address} refused the token. Set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file that its owner uses (`raysmith status` shows it). "
            f"Ray said: {text}"
        )
    return ClusterError(
        f"the Ray cluster at {address} cannot be joined: {text} Check `raysmith status`, "
        "or start a cluster with `raysmith up`."
    )


def _adopt(session: Session) -> None:
    """Use a session's address and token in this process, also if ray was imported before."""
    os.environ.update(session.environment())
    if "ray" in sys.modules:
        # Ray reads mode and token once. Its own authentication_token_setup.py refreshes them in
        # this way after it has changed the environment.
        import ray._raylet

        ray._raylet.Config.initialize("")
        ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _draft(config: HeadConfig) -> Session:
    gcs_port, dashboard_port, serve_port = processes.pick_ports(
        (
            (config.gcs_port, "the Ray head", "--port"),
            (config.dashboard_port, "the dashboard", "--dashboard-port"),
            (config.serve_port, "Ray Serve", "--serve-port"),
        )
    )
    # Unix socket paths end at 107 bytes (Linux) or 103 (macOS), and Ray adds about 70 to its
    # folder, so the short /tmp is used rather than $TMPDIR.
    base = "/tmp" if Path("/tmp").is_dir() else None
    with storage_errors("making the session's temporary folder"):
        temp_dir = tempfile.mkdtemp(prefix="rsm-", dir=base)
    return Session(
        name=config.name,
        pid=0,
        started_at_s=0.0,
        head_id=secrets.token_hex(8),
        address=f"{processes.LOOPBACK}:{gcs_port}",
        dashboard_url=f"http://{processes.LOOPBACK}:{dashboard_port}",
        serve_url=f"http://{processes.LOOPBACK}:{serve_port}",
        token_path=str(Path(temp_dir) / "token"),
        temp_dir=temp_dir,
        home=str(home().absolute()),
    )


def _launch(config: HeadConfig, draft: Session) -> Session:
    session = draft
    try:
        write_private(Path(draft.token_path), secrets.token_hex(32).encode())
        with draft.log_path.open("wb") as log:
            process = subprocess.Popen(
                head_command(config, draft),
                env=head_environment(draft),
                cwd=draft.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        began_s = processes.started_at_s(process.pid)
        session = draft.replace(pid=process.pid, started_at_s=began_s or time.time())
        save_session(session)
        _wait_ready(session)
    except BaseException:
        stop_head(session)
        raise
    process.returncode = 0  # the head outlives this process: Popen shall not warn of it
    return session


def _wait_ready(session: Session) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if not session.is_alive:
            raise ClusterError(f"Ray ended while it started.\n{_tail(session.log_path)}")
        if processes.is_listening(session.address) and _answers(session):
            return
        time.sleep(0.1)
    raise ClusterError(
        f"Ray did not start within {START_TIMEOUT_S:g} s.\n{_tail(session.log_path)}"
    )


def _answers(session: Session) -> bool:
    try:
        return session.request("/api/jobs/", timeout_s=2.0) is not None
    except ClusterError:
        return False


def _shut_serve_down(session: Session) -> None:
    details = session.request("/api/serve/applications/", timeout_s=2.0)
    if details and details.get("applications"):
        session.request(
            "/api/serve/applications/", method="DELETE", timeout_s=_SERVE_SHUTDOWN_TIMEOUT_S
        )


def _tail(path: Path, num_lines: int = 20) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])
