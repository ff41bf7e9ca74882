"""A Ray head of its own for a module of tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.session import HeadConfig, Session, start_head, stop_head


@contextmanager
def local_head(home: Path, name: str) -> Iterator[Session]:
    """Run a head of two CPUs whose jobs find files from `home`, on ports that were free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSMITH_STATE", str(home / "state"))
        patch.setenv("RAYSMITH_HOME", str(home))
        config = HeadConfig(name=name, num_cpus=2, gcs_port=0, dashboard_port=0, serve_port=0)
        running = start_head(config)
        try:
            yield running
        finally:
            stop_head(running)
