"""A real head: what it offers, who may join it, and that stopping it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.errors import ClusterError
from cluster.head import MARKER
from cluster.processes import started_at_s, tree
from cluster.session import (
    HeadConfig,
    Session,
    find_session,
    list_sessions,
    load_session,
    start_head,
    stop_head,
)

pytestmark = pytest.mark.ray

CONFIG = HeadConfig(name="test", num_cpus=2, gcs_port=0, dashboard_port=0, serve_port=0)
JOIN = """
import json, os
from cluster import inventory, session
session.connect()
import ray
print(json.dumps({"cpus": inventory.cluster_inventory().cpus, "home": os.environ["RAYSMITH_HOME"]}))
"""
SERVE = """
import sys
from ray import serve
from cluster import session
session.connect()
@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    def __call__(self, request):
        return "hello"
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Hello.bind(), name="hello")
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSMITH_STATE", str(folder))
        patch.setenv("RAYSMITH_HOME", str(folder))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAYSMITH_SESSION", raising=False)
        yield folder


@pytest.fixture(scope="module")
def session(state: Path) -> Iterator[Session]:
    running = start_head(CONFIG)
    yield running
    stop_head(running)


def run_python(code: str, session: Session, *arguments: str, **changes: str) -> str:
    """Run code as a child process that was given this session's environment."""
    environment = {**os.environ, **session.environment(), **changes}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout if done.returncode == 0 else done.stderr


def wait_for(session: Session, job: str) -> dict[str, str]:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        found: dict[str, str] = session.request(f"/api/jobs/{job}")
        if found["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
            return found
    raise AssertionError(f"job {job} did not end: {found}")


def test_head_when_started_is_found_and_its_files_are_private(session: Session) -> None:
    assert find_session("test") == session
    assert list_sessions() == [session]
    assert Path(session.token_path).stat().st_mode & 0o777 == 0o600
    assert Path(session.temp_dir).stat().st_mode & 0o777 == 0o700


def test_head_listens_for_the_dashboard_on_loopback_only(session: Session) -> None:
    port = int(session.dashboard_url.rpartition(":")[2])
    hosts = {
        connection.laddr.ip
        for process in tree(session.pid, (MARKER, session.head_id))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert hosts == {"127.0.0.1"}


def test_start_when_the_session_runs_is_refused(session: Session) -> None:
    with pytest.raises(ClusterError, match=f"already runs .pid {session.pid}"):
        start_head(CONFIG)


def test_connect_with_the_sessions_environment_sees_the_cluster(
    session: Session, state: Path
) -> None:
    seen = json.loads(run_python(JOIN, session).splitlines()[-1])
    assert seen == {"cpus": 2.0, "home": str(state)}


@pytest.mark.slow
def test_connect_with_another_token_is_refused(session: Session, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64, encoding="utf-8")
    said = run_python(JOIN, session, RAY_AUTH_TOKEN_PATH=str(token))
    assert "ClusterError" in said
    assert "RAY_AUTH_TOKEN_PATH" in said


def test_jobs_api_without_the_token_is_refused(session: Session, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64, encoding="utf-8")
    with pytest.raises(ClusterError, match=r"40[13]"):
        session.replace(token_path=str(token)).request("/api/jobs/")


def test_submitted_job_joins_its_own_cluster(session: Session, state: Path, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(JOIN, encoding="utf-8")
    code = (
        "import sys; from cluster import session; "
        "client = session.job_client(session.find_session()); "
        "print(client.submit_job(entrypoint='python main.py', "
        "runtime_env={'working_dir': sys.argv[1]}))"
    )
    job = run_python(code, session, str(tmp_path)).splitlines()[-1]
    assert wait_for(session, job)["status"] == "SUCCEEDED"
    logs: str = session.request(f"/api/jobs/{job}/logs")["logs"]
    assert json.loads(logs.splitlines()[-1]) == {"cpus": 2.0, "home": str(state)}


@pytest.mark.slow
def test_stop_with_serve_and_a_job_running_leaves_nothing(state: Path) -> None:
    session = start_head(CONFIG.replace(name="busy"))
    marker = (MARKER, session.head_id)
    try:
        run_python(SERVE, session, str(session.serve_port))
        applications = session.request("/api/serve/applications/")["applications"]
        submitted = (
            "from cluster import session; session.job_client(session.find_session())"
            ".submit_job(entrypoint='python -c \"import time; time.sleep(600)\"')"
        )
        run_python(submitted, session)
        began_s = time.monotonic()
        before = tree(session.pid, marker)
    finally:
        stop_head(session)
    assert "hello" in applications
    assert len(before) > 10
    assert time.monotonic() - began_s < 15
    assert tree(None, marker) == set()
    assert [process for process in before if started_at_s(process.pid)] == []
    assert not Path(session.temp_dir).exists()
    assert load_session("busy") is None


def test_stop_after_the_head_was_killed_leaves_nothing(state: Path) -> None:
    session = start_head(CONFIG.replace(name="killed"))
    os.kill(session.pid, signal.SIGKILL)
    psutil.Process(session.pid).wait(timeout=10)
    stop_head(session)
    assert tree(None, (MARKER, session.head_id)) == set()
    assert not Path(session.temp_dir).exists()
    assert load_session("killed") is None
