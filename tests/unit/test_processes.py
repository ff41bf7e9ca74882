import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from cluster import processes
from cluster.errors import ConfigError, PortTakenError

SLEEPER = "import time; time.sleep(60)"
PARENT = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', "
    f"{SLEEPER!r}], start_new_session=True); print(child.pid, flush=True); child.wait()"
)
MARKER = ("RAYSMITH_TEST_MARKER", "1f3a")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind((processes.LOOPBACK, 0))
        server.listen()
        yield server.getsockname()[1]


def start(code: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_pick_port_when_taken_names_port_purpose_and_option(taken_port: int) -> None:
    with pytest.raises(PortTakenError, match=rf"port {taken_port} .*dashboard.*`dashboard_port`"):
        processes.pick_port(taken_port, "the dashboard", "dashboard_port")


def test_pick_port_when_zero_returns_a_free_one() -> None:
    port = processes.pick_port(0, "a test", "port")
    assert processes.pick_port(port, "a test", "port") == port


def test_pick_ports_when_one_is_found_free_twice_takes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter([5001, 5001, 5002])
    monkeypatch.setattr(processes, "pick_port", lambda port, what, option: next(found))
    wanted = [(0, "a test", "first"), (0, "a test", "second")]
    assert processes.pick_ports(wanted) == [5001, 5002]


def test_pick_ports_when_two_options_name_one_port_names_both() -> None:
    port = processes.pick_port(0, "a test", "port")
    with pytest.raises(ConfigError, match=f"`first` and `second` are both {port}"):
        processes.pick_ports([(port, "a test", "first"), (port, "a test", "second")])


def test_pick_port_when_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="70000"):
        processes.pick_port(70000, "a test", "port")


def test_is_listening_follows_the_port(taken_port: int) -> None:
    free = processes.pick_port(0, "a test", "port")
    assert processes.is_listening(f"{processes.LOOPBACK}:{taken_port}")
    assert not processes.is_listening(f"{processes.LOOPBACK}:{free}", timeout_s=0.2)
    assert not processes.is_listening("no-port-here")


def test_started_at_when_process_ended_is_none() -> None:
    process = start("pass")
    process.communicate()
    assert processes.started_at_s(process.pid) is None


def test_end_tree_ends_descendants_in_sessions_of_their_own() -> None:
    parent = start(PARENT)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert processes.end_tree(parent.pid, MARKER, grace_s=2.0) == 0
    assert not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE
    assert processes.started_at_s(parent.pid) is None
    parent.communicate()


def test_end_tree_without_leader_ends_marked_processes_only() -> None:
    marked, other = start(SLEEPER, **{MARKER[0]: MARKER[1]}), start(SLEEPER, **{MARKER[0]: "else"})
    try:
        assert processes.end_tree(None, MARKER, grace_s=1.0) == 0
        assert processes.started_at_s(marked.pid) is None
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
        marked.communicate()
