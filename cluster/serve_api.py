"""Ray Serve's REST API on the cluster that this process belongs to.

Takes a session, or finds the cluster as a Ray job sees it; gives a client and the port that the
gateway shall listen on. It does not know what an application is.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, ConfigError
from cluster.session import Session, find_session

DEFAULT_SERVE_PORT = 8000


@dataclass(frozen=True)
class ServeApi:
    """The declarative API: what runs is what the last config says."""

    dashboard_url: str
    http_port: int
    token_path: str | None = None

    def details(self) -> dict[str, Any]:
        """Return the state of every application and deployment."""
        return dict(self._call("get_serve_details"))

    def deploy(self, config: dict[str, Any]) -> None:
        """Make the cluster run exactly the applications of this config."""
        self._call("deploy_applications", config)

    def _call(self, method: str, *arguments: Any) -> Any:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # deferred: slow import

        try:
            client = ServeSubmissionClient(self.dashboard_url, headers=self._headers())
            return getattr(client, method)(*arguments)
        except (ConnectionError, RuntimeError, OSError) as error:
            raise ClusterError(
                f"Ray Serve's API at {self.dashboard_url} did not accept the call: {error}"
            ) from error

    def _headers(self) -> dict[str, str] | None:
        """Return the cluster's own token: Ray's client keeps the first one a process has used."""
        if self.token_path is None:
            return None
        token = Path(self.token_path).read_text(encoding="utf-8").strip()
        return {"Authorization": f"Bearer {token}"}


def serve_api(session: Session | None = None) -> ServeApi:
    """Return the API of a session, or of the cluster that this job runs on.

    Without a session: the one named by RAYSMITH_SESSION (set for every job on a cluster that
    `raysmith up` started), else the address in RAY_DASHBOARD_ADDRESS.
    """
    if session is None and (name := os.environ.get("RAYSMITH_SESSION")):
        session = find_session(name)
    if session is not None:
        return ServeApi(session.dashboard_url, session.serve_port, session.token_path)
    if url := os.environ.get("RAY_DASHBOARD_ADDRESS"):
        return ServeApi(url, DEFAULT_SERVE_PORT)
    raise ConfigError(
        "no cluster to deploy on: neither RAYSMITH_SESSION nor RAY_DASHBOARD_ADDRESS is set. "
        "Submit this as a job, or set RAY_DASHBOARD_ADDRESS to the dashboard's address."
    )
