import os
import time
from pathlib import Path

import pytest

from cluster import session as sessions
from cluster.errors import ClusterError, ConfigError, PortTakenError, VersionMismatchError
from cluster.head import MARKER, HeadConfig, head_command, head_environment
from cluster.processes import LOOPBACK, pick_port, started_at_s
from cluster.session_state import Session, save_session, write_private

OPTIONS = {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_ADDRESS", "RAYSMITH_SESSION", "RAYSMITH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def make(tmp_path: Path, *, name: str = "default", pid: int | None = None) -> Session:
    pid = os.getpid() if pid is None else pid
    return Session(
        name=name,
        pid=pid,
        started_at_s=started_at_s(pid) or 0.0,
        head_id="abc",
        address="127.0.0.1:6400",
        dashboard_url="http://127.0.0.1:8300",
        serve_url="http://127.0.0.1:8100",
        token_path=str(tmp_path / "token"),
        temp_dir=str(tmp_path / "temporary"),
        home=str(tmp_path),
    )


def test_find_when_saved_and_alive_returns_it(tmp_path: Path) -> None:
    session = make(tmp_path)
    save_session(session)
    assert sessions.find_session() == session
    assert sessions.list_sessions() == [session]


def test_find_when_named_by_the_environment_returns_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_session(make(tmp_path, name="other"))
    monkeypatch.setenv("RAYSMITH_SESSION", "other")
    assert sessions.find_session().name == "other"


def test_find_when_absent_lists_what_runs(tmp_path: Path) -> None:
    save_session(make(tmp_path, name="one"))
    with pytest.raises(ClusterError, match=r"no session `two`.*running: one.*`raysmith up`"):
        sessions.find_session("two")


def test_find_when_pid_belongs_to_a_later_process_is_not_alive(tmp_path: Path) -> None:
    save_session(make(tmp_path).replace(started_at_s=time.time() - 10_000))
    with pytest.raises(ClusterError, match="no session `default`"):
        sessions.find_session()


def test_find_when_name_leaves_the_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="session name"):
        sessions.find_session("../token")


def test_load_when_file_is_damaged_names_it(tmp_path: Path, state: Path) -> None:
    save_session(make(tmp_path))
    path = state / "sessions" / "default.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"default\.json is not a session file"):
        sessions.load_session("default")


def test_saved_files_are_readable_by_their_owner_only(tmp_path: Path, state: Path) -> None:
    save_session(make(tmp_path))
    write_private(tmp_path / "secret", b"token")
    modes = [path.stat().st_mode & 0o777 for path in (state / "sessions").iterdir()]
    assert [*modes, (tmp_path / "secret").stat().st_mode & 0o777] == [0o600, 0o600]


def test_stop_when_head_is_dead_removes_what_it_left(tmp_path: Path) -> None:
    session = make(tmp_path, pid=0)
    save_session(session)
    Path(session.temp_dir).mkdir()
    sessions.stop_head(session)
    assert not Path(session.temp_dir).exists()
    assert sessions.load_session("default") is None


def test_stop_when_a_newer_session_has_the_name_keeps_its_record(tmp_path: Path) -> None:
    newer = make(tmp_path).replace(head_id="newer")
    save_session(newer)
    sessions.stop_head(make(tmp_path, pid=0))
    assert sessions.load_session("default") == newer


def test_start_when_the_name_runs_is_refused(tmp_path: Path) -> None:
    save_session(make(tmp_path))
    with pytest.raises(ClusterError, match=r"already runs.*raysmith down"):
        sessions.start_head(HeadConfig(**OPTIONS))


def test_start_when_a_port_is_taken_starts_nothing(state: Path) -> None:
    import socket

    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} .*`--dashboard-port`"):
            sessions.start_head(HeadConfig(**{**OPTIONS, "dashboard_port": port}))
    assert sessions.load_session("default") is None


def test_start_when_name_is_unsafe_is_refused() -> None:
    with pytest.raises(ConfigError, match="session name `a/b`"):
        sessions.start_head(HeadConfig(name="a/b", **OPTIONS))


def test_environment_reaches_the_cluster_past_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "internal,localhost")
    environment = make(tmp_path).environment()
    assert environment["RAY_ADDRESS"] == "127.0.0.1:6400"
    assert environment["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:8300"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert environment["NO_PROXY"] == "127.0.0.1,localhost,internal"


def test_head_environment_marks_its_tree_and_names_no_other_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    environment = head_environment(make(tmp_path))
    assert "RAY_ADDRESS" not in environment
    assert environment[MARKER] == "abc"
    assert environment["RAYSMITH_HOME"] == str(tmp_path)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


def test_head_command_listens_where_the_session_says(tmp_path: Path) -> None:
    command = head_command(HeadConfig(num_cpus=3), make(tmp_path))
    wanted = {"--head", "--block", "--port=6400", "--dashboard-port=8300", "--num-cpus=3"}
    assert wanted <= set(command)
    assert f"--dashboard-host={LOOPBACK}" in command
    assert f"--temp-dir={tmp_path / 'temporary' / 'r'}" in command


def test_request_when_nothing_listens_names_url_and_session(tmp_path: Path) -> None:
    port = pick_port(0, "a test", "port")
    session = make(tmp_path).replace(dashboard_url=f"http://{LOOPBACK}:{port}")
    Path(session.token_path).write_text("t", encoding="utf-8")
    with pytest.raises(ClusterError, match=rf"GET http://127.0.0.1:{port}/x of session `default`"):
        session.request("/x", timeout_s=1.0)


def test_join_when_nothing_listens_says_so_at_once() -> None:
    port = pick_port(0, "a test", "port")
    began_s = time.monotonic()
    with pytest.raises(ClusterError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}"):
        sessions.join(f"{LOOPBACK}:{port}")
    assert time.monotonic() - began_s < 6.0


@pytest.mark.parametrize(
    ("said", "cls", "advice"),
    [
        ("Version mismatch: The cluster was started with: Ray: 2.59", VersionMismatchError, "same"),
        ("InvalidAuthToken: wrong", ClusterError, "RAY_AUTH_TOKEN_PATH"),
        ("timed out", ClusterError, "raysmith status"),
    ],
)
def test_translate_when_ray_refuses_gives_class_and_advice(
    said: str, cls: type[ClusterError], advice: str
) -> None:
    error = sessions.translate_error("1.2.3.4:6379", RuntimeError(said))
    assert type(error) is cls
    assert said in error.message
    assert advice in error.message
