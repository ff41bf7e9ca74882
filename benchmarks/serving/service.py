"""Raysmith as its users run it: a cluster, published models, a ledger, a gateway.

Takes model directories; gives an address and keys. It goes through the public commands' functions,
so what is measured is what `raysmith serve` starts.
"""

import os
import re
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.serving.http_client import Api
from benchmarks.serving.models import ROOT
from cluster.accounting import Key, Scope, Team, month_of
from cluster.errors import EngineError
from cluster.ledger import Ledger
from cluster.serve_api import serve_api
from cluster.session import HeadConfig, start_head, stop_head
from jobs.config import DeployConfig
from jobs.deploy import deploy
from jobs.registry import Registry

SESSION = "benchmark"
_SETTLE_TIMEOUT_S = 30.0


class Service:
    """A cluster of its own with a gateway; leaves nothing behind."""

    def __init__(self) -> None:
        """Start the cluster."""
        self._folder = tempfile.TemporaryDirectory(prefix="raysmith-bench-")
        root = Path(self._folder.name)
        self.registry_root, self.ledger_path = root / "registry", str(root / "ledger.db")
        self._registry = Registry(self.registry_root)
        self._ledger = Ledger.open(self.ledger_path)
        # Two models take turns on the same cores, so the cluster counts them twice.
        ports = {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
        num_cpus = 2 * (os.cpu_count() or 1)
        self.session = start_head(HeadConfig(name=SESSION, num_cpus=num_cpus, **ports))

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stop_head(self.session)
        self._ledger.close()
        self._folder.cleanup()

    def publish(self, directory: Path, name: str) -> str:
        """Put a model into the registry and return its reference."""
        return self._registry.publish(directory, name).reference

    def offer(self, reference: str, options: dict[str, Any], **changes: Any) -> None:
        """Deploy a version and wait until it answers."""
        config = DeployConfig(
            model=reference, ledger=self.ledger_path, engine_options=options, **changes
        )
        deploy(config, str(self.registry_root), serve_api(self.session))

    def api(self, model: str, team: str = "bench", tokens_per_month: int | None = None) -> Api:
        """Return the address with a new key of a team, which is added if need be."""
        if team not in self._ledger.snapshot().teams:
            self._ledger.add_team(Team(name=team, tokens_per_month=tokens_per_month))
        scopes = frozenset({Scope.INFERENCE, Scope.METRICS})
        _, secret = self._ledger.new_key(Key(id="", team=team, scopes=scopes))
        parts = urlsplit(self.session.serve_url)
        assert parts.hostname is not None, self.session.serve_url
        assert parts.port is not None, self.session.serve_url
        return Api(parts.hostname, parts.port, secret, model)

    def used(self, api: Api, team: str) -> dict[str, int]:
        """Return a team's prompt and generated tokens of this month, as the ledger has them.

        Requests that ended are settled first, and what is settled is written before the gateway
        says what was used. Raises EngineError if requests do not end.
        """
        until_s = time.monotonic() + _SETTLE_TIMEOUT_S
        while self.metric(api, "raysmith_accepted_choices"):
            if time.monotonic() > until_s:
                raise EngineError(f"requests still ran {_SETTLE_TIMEOUT_S:g} s after the last one.")
            time.sleep(0.05)
        self._get(api, "/v1/usage")
        rows = self._ledger.usage(month=month_of(time.time()), by=("team",), team=team)
        return {
            "prompt_tokens": sum(row.used.prompt_tokens for row in rows),
            "generated_tokens": sum(row.used.generated_tokens for row in rows),
        }

    def metric(self, api: Api, name: str) -> float:
        """Return the sum of one metric over its labels, from the gateway's page."""
        page = self._get(api, "/metrics")
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
        return sum(map(float, values))

    def processes(self, marker: str) -> list[psutil.Process]:
        """Return the cluster's processes whose title holds `marker`."""
        tree = psutil.Process(self.session.pid).children(recursive=True)
        return [process for process in tree if marker in " ".join(_title(process))]

    @staticmethod
    def _get(api: Api, path: str) -> str:
        url = f"http://{api.host}:{api.port}{path}"
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {api.key}"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return str(answer.read().decode())

    def environment(self) -> dict[str, str]:
        """Return the environment in which `raysmith` finds this cluster and ledger."""
        return {
            **os.environ,
            **self.session.environment(),
            "RAYSMITH_LEDGER": self.ledger_path,
            "PYTHONPATH": str(ROOT),
        }


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
