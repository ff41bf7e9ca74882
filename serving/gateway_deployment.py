"""The gateway as Ray Serve runs it: on a port of its own, without a proxy before it.

Takes bounds, accounts and a routing table; gives the REST API. A new table arrives without a
restart. See docs/decisions/0005-the-gateway-has-its-own-port.md for the port.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.config import parse_config
from cluster.errors import ClusterError
from cluster.steward import RemoteSteward
from serving.directory import Directory
from serving.fleet import Fleet, Waits
from serving.gateway.accounts_client import LedgerAccounts
from serving.gateway.app import create_app
from serving.gateway.limits import GatewayLimits
from serving.gateway.logs import start_access_log
from serving.http_server import HttpServer
from serving.loop_thread import LoopThread
from serving.ray_directory import RayDirectory
from serving.routing import Route, RoutingTable

ENGINE_DEPLOYMENT = "engine"
_READY_TIMEOUT_S = 10.0
_TURN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class GatewayOptions:
    """Where a gateway listens, and how long it waits; see `serving.app.ServeArgs`."""

    host: str
    port: int
    drain_s: float
    cold_start_s: float


class GatewayDeployment:
    """One gateway; see `serving.app.build`."""

    def __init__(self, ledger: str | None, limits: GatewayLimits, options: GatewayOptions) -> None:
        """Take the port, but answer nothing yet: without a table there would be no model."""
        start_access_log()
        self._drain_s = options.drain_s
        self._thread = LoopThread("gateway")
        node_id = ray.get_runtime_context().get_node_id()
        self._fleet, self._accounts, self._http = self._thread.run(
            _start(ledger, limits, options, RayDirectory(), node_id)
        )

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Take a new routing table, and return once what it names can be asked, or soon.

        The first one opens the port: until then the gateway that this one replaces answers alone.
        Raises ConfigError.
        """
        table = parse_config(RoutingTable, config, "the gateway's user_config")
        self._thread.run(_set_table(self._fleet, self._http, table))

    def check_health(self) -> None:
        """Raise ClusterError if the port is not served; Ray Serve then starts another gateway."""
        self._thread.run(asyncio.sleep(0), _TURN_TIMEOUT_S)  # TimeoutError if the loop hangs.
        if not self._http.is_serving:
            raise ClusterError(f"the gateway no longer answers on port {self._http.port}.")

    def __del__(self) -> None:
        """Let answers end, then stop, as Ray Serve asks for."""
        if hasattr(self, "_http"):  # Not if the constructor failed.
            try:
                self._thread.run(stop(self._http, self._accounts, self._fleet, self._drain_s))
            finally:
                self._thread.stop()


async def wake(route: Route) -> None:
    """Ask Ray Serve for a replica of a version that has none, and wait until there is one."""
    try:
        handle = serve.get_deployment_handle(ENGINE_DEPLOYMENT, route.application)
        await handle.wake.remote()
    except RayServeException as error:
        raise ClusterError(f"application `{route.application}` is not deployed: {error}") from error


async def stop(http: HttpServer, accounts: LedgerAccounts, fleet: Fleet, drain_s: float) -> None:
    """Let answers end, then close each of these, even where one before it failed."""
    try:
        await http.stop(drain_s)
    finally:
        try:
            await accounts.aclose()  # After the last answer is charged.
        finally:
            await fleet.close()


async def _start(
    ledger: str | None,
    limits: GatewayLimits,
    options: GatewayOptions,
    directory: Directory,
    node_id: str,
) -> tuple[Fleet, LedgerAccounts, HttpServer]:
    fleet = Fleet(directory, node_id, wake, Waits(cold_start_s=options.cold_start_s))
    accounts = LedgerAccounts(ledger, RemoteSteward(ledger))
    server = HttpServer(create_app(fleet, accounts, limits), options.host, options.port)
    fleet.start()
    return fleet, accounts, server


async def _set_table(fleet: Fleet, server: HttpServer, table: RoutingTable) -> None:
    fleet.set_table(table)
    await fleet.wait_ready(_READY_TIMEOUT_S)
    if not server.has_started:
        await server.start()
