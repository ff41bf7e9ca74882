"""A search as its users run it: a driver process on a cluster.

Takes a configuration and a running head; gives the process, or its end.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from cluster.errors import SearchError
from cluster.session import HeadConfig, Session, start_head, stop_head
from jobs.config import SearchConfig


@contextmanager
def cluster(name: str) -> Iterator[Session]:
    """Run a head of its own, with one CPU a core."""
    ports = {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
    session = start_head(HeadConfig(name=name, num_cpus=os.cpu_count() or 1, **ports))
    try:
        yield session
    finally:
        stop_head(session)


def start(config: SearchConfig, session: Session) -> "subprocess.Popen[str]":
    """Start `python -m jobs.search` on the cluster."""
    path = Path(config.output_dir) / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.search", "--config", str(path), "--json"],
        env={**os.environ, **session.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(config: SearchConfig, session: Session) -> None:
    """Run a search to its end. Raises SearchError if it fails."""
    driver = start(config, session)
    _, said = driver.communicate()
    if driver.returncode != 0:
        raise SearchError(f"the search `{config.name}` failed: {said[-2000:]}")
