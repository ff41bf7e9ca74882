"""Ports and process trees of this machine.

Takes PIDs, an environment marker and port numbers; finds, ends and checks exactly those. It does
not know Ray: a process belongs to a tree by descent or because it inherited the tree's marker.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterable

import psutil

from cluster.errors import ConfigError, PortTakenError

LOOPBACK = "127.0.0.1"
_GONE = (psutil.NoSuchProcess, psutil.AccessDenied)


def pick_port(port: int, what: str, option: str) -> int:
    """Return `port` if nothing listens on it, or a free one for 0.

    Raises ConfigError out of 0..65535 and PortTakenError naming the port and the option to change.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"`{option}` = {port}: a port is 0 (any free one) to 65535.")
    for host in (LOOPBACK, ""):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
                candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                candidate.bind((host, port))
                port = candidate.getsockname()[1]
        except OSError as error:
            raise PortTakenError(
                f"port {port} is needed for {what} and cannot be used: {error.strerror}. "
                f"Stop what listens there, or set `{option}` to another port (0: any free one)."
            ) from None
    return port


def pick_ports(wanted: Iterable[tuple[int, str, str]]) -> list[int]:
    """Return a port for each (port, what, option), no two alike; see `pick_port`.

    Raises ConfigError where two options name the same port.
    """
    picked: dict[int, str] = {}
    for port, what, option in wanted:
        if port in picked:
            raise ConfigError(
                f"`{picked[port]}` and `{option}` are both {port}: give each a port of its own."
            )
        free = pick_port(port, what, option)
        while free in picked:  # What was found free before is not taken yet.
            free = pick_port(port, what, option)
        picked[free] = option
    return list(picked)


def is_listening(address: str, timeout_s: float = 2.0) -> bool:
    """Say whether something accepts TCP connections at `host:port`."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except OSError:
        return False


def started_at_s(pid: int) -> float | None:
    """Return when a living process began, in seconds since the epoch; None if there is none."""
    try:
        process = psutil.Process(pid)
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return process.create_time() if alive else None
    except _GONE:
        return None


def tree(pid: int | None, marker: tuple[str, str]) -> set[psutil.Process]:
    """Return the living descendants of `pid` and every process whose environment has the marker."""
    found: set[psutil.Process] = set()
    if pid is not None:
        with contextlib.suppress(*_GONE):
            found.update(psutil.Process(pid).children(recursive=True))
    for process in psutil.process_iter():
        with contextlib.suppress(*_GONE, OSError):
            if process.environ().get(marker[0]) == marker[1]:
                found.add(process)
    own = os.getpid()
    return {process for process in _alive(found) if process.pid != own}


def end_tree(
    pid: int | None, marker: tuple[str, str], *, grace_s: float, kill_wait_s: float = 5.0
) -> int:
    """End `pid` by SIGTERM, then whatever of its tree is left; return how many were still alive.

    The leader has `grace_s` to end its children itself; the rest is killed. Without a leader
    (`pid` None) only what carries the marker is ended.
    """
    known = tree(pid, marker)
    if pid is not None:
        with contextlib.suppress(*_GONE):
            leader = psutil.Process(pid)
            known.add(leader)
            leader.terminate()
            _wait_gone({leader}, grace_s)
    deadline_s = time.monotonic() + kill_wait_s
    left = _alive(known | tree(None, marker))
    while left and time.monotonic() < deadline_s:
        for process in left:
            with contextlib.suppress(*_GONE):
                process.kill()
        _wait_gone(left, 1.0)
        left = _alive(left | tree(None, marker))
    return len(left)


def _alive(processes: set[psutil.Process]) -> set[psutil.Process]:
    return {process for process in processes if _is_alive(process)}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except _GONE:
        return False


def _wait_gone(processes: set[psutil.Process], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(_is_alive(process) for process in processes) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for process in processes:
        with contextlib.suppress(psutil.TimeoutExpired, *_GONE):
            process.wait(timeout=0)
