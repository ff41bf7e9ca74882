"""Offer a published model: a config handed to Ray Serve, then wait until it answers.

Takes a DeployConfig; gives the address. The application is named by its import path, as data, so
nothing of `serving` is imported here. Other applications on the cluster are left as they are.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import ClusterError, ConfigError
from cluster.storage import resolve_output
from jobs.config import DeployConfig
from jobs.registry import Entry, Registry


class Api(Protocol):
    """What is used of Ray Serve's REST API; `cluster.serve_api.ServeApi` offers it."""

    @property
    def http_port(self) -> int:
        """Port that Serve listens on."""

    def details(self) -> dict[str, Any]:
        """Return the state of every application."""

    def deploy(self, config: dict[str, Any]) -> None:
        """Make the cluster run exactly the applications of this config."""


def application(config: DeployConfig, registry: Path, entry: Entry) -> dict[str, Any]:
    """Return the Serve application that offers one registry entry."""
    return {
        "name": config.application,
        "route_prefix": config.route_prefix,
        "import_path": config.import_path,
        "args": {
            "registry": str(registry),
            "models": [entry.reference],
            "api_keys_file": str(resolve_output(config.api_keys_file)),
            "num_replicas": config.num_replicas,
            "cpus_per_replica": config.cpus_per_replica,
        },
    }


def merge(details: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the applications to deploy: those running now, with `new` added or in its place.

    Raises ConfigError if another application answers under the same path.
    """
    running = [
        app["deployed_app_config"]
        for name, app in details.get("applications", {}).items()
        if name != new["name"] and app.get("deployed_app_config")
    ]
    for app in running:
        if app.get("route_prefix", "/") == new["route_prefix"]:
            raise ConfigError(
                f"application `{app['name']}` answers under `{new['route_prefix']}` already. "
                f"Deploy under its name to replace it, or set another `route_prefix` for "
                f"`{new['name']}`."
            )
    return [*running, dict(new)]


def deploy(config: DeployConfig, registry_root: str, api: Api) -> Entry:
    """Deploy the model and wait until the application runs.

    Raises ModelNotFoundError or IntegrityError before anything is changed, and ClusterError with
    Serve's own message if the application does not come up within `ready_timeout_s`.
    """
    root = resolve_output(registry_root)
    entry = Registry(root).resolve(config.model)
    applications = merge(api.details(), application(config, root, entry))
    api.deploy(serve_config(applications, api.http_port))
    _wait_until_running(config, api)
    return entry


def serve_config(applications: Sequence[Mapping[str, Any]], http_port: int) -> dict[str, Any]:
    """Return a whole Serve config that listens on the loopback address only."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "applications": [dict(app) for app in applications],
    }


def _wait_until_running(config: DeployConfig, api: Api) -> None:
    deadline = time.monotonic() + config.ready_timeout_s
    status, message = "NOT_STARTED", ""
    while time.monotonic() < deadline:
        app = api.details().get("applications", {}).get(config.application, {})
        status, message = app.get("status", status), app.get("message", message)
        if status == "RUNNING":
            return
        if status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            break
        time.sleep(0.25)
    raise ClusterError(
        f"application `{config.application}` is {status} after the deployment: "
        f"{message or 'Serve says no more'}. Look at the replica's log with `ray logs`."
    )
