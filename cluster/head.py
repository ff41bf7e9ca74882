"""How a head node is started: its configuration, command line and environment.

Takes a HeadConfig and a Session that says where things will listen; gives values, starts nothing.
"""

import os
import sys
from pathlib import Path

from pydantic import Field

from cluster import processes
from cluster.config import StrictModel
from cluster.session_state import Session
from cluster.storage import MIB

MARKER = "RAYSMITH_HEAD_ID"
# Ray tells its own drivers where they are; a head that inherits these refuses to start.
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")


class HeadConfig(StrictModel):
    """A local head node; port 0 picks a free one."""

    name: str = Field("default", description="Name of the session.")
    num_cpus: int | None = Field(None, ge=1, description="CPUs to offer; unset: all.")
    gcs_port: int = Field(6379, ge=0, le=65535, description="Port that drivers connect to.")
    dashboard_port: int = Field(8265, ge=0, le=65535, description="Port of jobs API and pages.")
    serve_port: int = Field(8000, ge=0, le=65535, description="Port of the REST gateway.")
    object_store_bytes: int = Field(512 * MIB, ge=80 * MIB, description="Shared object memory.")


def head_command(config: HeadConfig, session: Session) -> list[str]:
    """Return the command line of a head that listens where the session says, until it is ended."""
    options: dict[str, str | int] = {
        "node-ip-address": processes.LOOPBACK,
        "port": session.address.rpartition(":")[2],
        "dashboard-host": processes.LOOPBACK,
        "dashboard-port": session.dashboard_url.rpartition(":")[2],
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": processes.pick_port(0, "Ray Client", "gcs_port"),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": session.ray_dir,
        "object-store-memory": config.object_store_bytes,
    }
    if config.num_cpus is not None:  # otherwise Ray counts, and knows containers
        options["num-cpus"] = config.num_cpus
    flags = [f"--{key}={value}" for key, value in options.items()]
    ray_cli = "from ray.scripts.scripts import main; main()"
    return [sys.executable, "-c", ray_cli, "start", "--head", "--block", *flags]


def head_environment(session: Session) -> dict[str, str]:
    """Return the environment of a head: this process's, with the session's token and marker."""
    merged = {**os.environ, **session.environment()}
    scripts = str(Path(sys.prefix) / "bin")
    return {
        **{key: value for key, value in merged.items() if key not in _ADDRESSES},
        MARKER: session.head_id,
        "PATH": scripts + os.pathsep + os.environ.get("PATH", os.defpath),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Synchronous reports of Ray Train wait for this poll; its default is 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        # How often replicas tell Ray Serve their load; the default is 10 s.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        # Replicas and training workers are what the machine is for; the default is 15, behind every
        # other process, and a product that waits for one of its threads is late by its whole turn.
        "RAY_worker_niceness": "0",
        # A local head has no traffic to move elsewhere; the default waits 30 s for that.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
