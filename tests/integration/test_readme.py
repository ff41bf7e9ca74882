"""The README's tour, word for word, on a real cluster; only its ports are replaced by free ones."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 420


def tour_script(readme: str) -> str:
    """Return one shell script of every `bash` and `python` block, in order."""
    parts = ["set -euo pipefail\n"]
    for kind, body in BLOCK.findall(readme):
        parts.append(body if kind == "bash" else f"python - <<'END_OF_BLOCK'\n{body}END_OF_BLOCK\n")
        parts.append("echo\n")
    return "".join(parts)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the tracked files with the environment that runs this test."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    target = tmp_path / "raysmith"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(sys.prefix)
    return target


@pytest.fixture
def free_ports() -> tuple[int, int, int]:
    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    first, second, third = (each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    return first, second, third


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_readme_tour_when_followed_word_for_word_ends_with_an_answer(
    checkout: Path, free_ports: tuple[int, int, int], tmp_path: Path
):
    gcs, dashboard, serve = free_ports
    script = tour_script((ROOT / "README.md").read_text(encoding="utf-8"))
    ports = f"raysmith up --port {gcs} --dashboard-port {dashboard} --serve-port {serve}"
    script = script.replace("raysmith up\n", ports + "\n").replace(":8000", f":{serve}")
    env = {**os.environ, "RAYSMITH_STATE": str(tmp_path / "state")}
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=checkout,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the tour did not end within {TIMEOUT_S} s:\n{output[-5000:]}")
    finally:
        down = [str(checkout / ".venv/bin/raysmith"), "down", "--all"]
        subprocess.run(down, cwd=checkout, env=env, check=False, capture_output=True)
    assert process.returncode == 0, output[-5000:]
    assert '"object":"text_completion"' in output.replace(" ", "")
    assert (checkout / "runs/registry/stdlib-tiny/1/manifest.json").is_file()
    assert "stopped cluster `default`" in output
