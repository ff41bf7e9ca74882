"""A search whose driver is killed again and again, beside one that is left alone.

Takes a search's configuration; runs it on a real cluster of its own twice: once to the end, once
with `kill -9` at seeded random moments, started again each time. Gives the trials of both journals
and how they differ. Trials are the same where tasks, recipes, losses and bytes are: times never
repeat.
"""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.search.runs import run, start
from cluster.errors import SearchError
from cluster.session import Session
from jobs.config import SearchConfig

_TIMED = {"seconds", "checks", "request_ms", "base_request_ms"}
_PAUSE_S = 1.0
_START_SHARE = 0.1  # Of a whole search, until its first task begins.


def measure_kills(
    config: SearchConfig, session: Session, num_kills: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return how many trials both searches ran, and those that differ or ran twice."""
    control = config.replace(name=f"{config.name}-control")
    began = time.monotonic()
    run(control, session)
    whole_s = time.monotonic() - began
    say(f"control: {whole_s:.0f} s")
    generator = random.Random(seed)
    killed_after_s: list[float] = []
    start_s = _START_SHARE * whole_s
    while len(killed_after_s) < num_kills:
        # Each start takes as long as the others before it does anything; then a share is done.
        wait_s = start_s + generator.uniform(0.1, 0.9) * (whole_s - start_s) / num_kills
        if not _run_and_kill(config, session, wait_s):
            raise SearchError(
                f"the search had ended before kill {len(killed_after_s) + 1} of {num_kills}. Give "
                "it more trials."
            )
        killed_after_s.append(round(wait_s, 2))
        say(f"kill {len(killed_after_s)} after {wait_s:.1f} s, {_count(config)} results")
    run(config, session)
    ours, theirs = _trials(config), _trials(control)
    differing = sorted(
        key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
    )
    return {
        "kills": num_kills,
        "killed_after_s": killed_after_s,
        "trials": len(ours),
        "trials_of_control": len(theirs),
        "differing": differing,
        "repeated": _count(config) - len(ours),
        "is_same": not differing and _count(config) == len(ours),
    }


def _run_and_kill(config: SearchConfig, session: Session, wait_s: float) -> bool:
    """Start the search and kill it; return whether it was still running."""
    driver = start(config, session)
    try:
        driver.communicate(timeout=wait_s)
    except subprocess.TimeoutExpired:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        time.sleep(_PAUSE_S)  # Ray notices, and gives its workers' CPUs back.
        return True
    if driver.returncode != 0:
        raise SearchError(f"the search `{config.name}` failed before it was killed")
    return False


def _lines(config: SearchConfig) -> list[dict[str, Any]]:
    path = Path(config.output_dir) / config.name / "journal.jsonl"
    if not path.is_file():
        return []
    bodies = []
    for line in path.read_text().splitlines():
        try:
            bodies.append(json.loads(json.loads(line)["body"]))
        except ValueError:  # The last line of a driver that was killed while it wrote.
            continue
    return [body for body in bodies if "task" in body]


def _count(config: SearchConfig) -> int:
    return len(_lines(config))


def _trials(config: SearchConfig) -> dict[str, Any]:
    """Return what was measured by task, without times."""
    found = {}
    for body in _lines(config):
        result = {key: value for key, value in body["result"].items() if key not in _TIMED}
        found[json.dumps(body["task"], sort_keys=True)] = result
    return found
