"""How a gateway of Ray Serve begins and ends."""

import asyncio
from pathlib import Path

import httpx
import pytest

from cluster.ledger import Ledger
from serving.directory import LocalDirectory
from serving.gateway.limits import GatewayLimits
from serving.gateway_deployment import GatewayOptions, _set_table, _start, stop
from serving.routing import Route, RoutingTable


class Part:
    """Something to close, which fails if it is told to; remembers that it was asked."""

    def __init__(self, name: str, closed: list[str], *, is_failing: bool) -> None:
        self._name, self._closed, self._is_failing = name, closed, is_failing

    async def aclose(self) -> None:
        self._closed.append(self._name)
        if self._is_failing:
            raise OSError(f"{self._name} failed")

    close = aclose

    async def stop(self, drain_s: float) -> None:
        assert drain_s == 3.0
        await self.aclose()


@pytest.mark.parametrize("failing", ["http", "accounts", "fleet"])
def test_stop_when_one_part_fails_closes_the_others(failing: str):
    closed: list[str] = []
    names = ("http", "accounts", "fleet")
    http, accounts, fleet = (Part(n, closed, is_failing=n == failing) for n in names)
    with pytest.raises(OSError, match=f"{failing} failed"):
        asyncio.run(stop(http, accounts, fleet, 3.0))
    assert closed == list(names)


def test_gateway_when_it_has_no_routing_table_yet_leaves_the_port_to_others(tmp_path: Path):
    path = str(tmp_path / "ledger.db")
    with Ledger.open(path):
        pass
    asleep = Route(name="tiny", version="1", application="engine--tiny--1", scales_to_zero=True)

    async def work() -> tuple[bool, httpx.Response]:
        options = GatewayOptions("127.0.0.1", 0, 3.0, 1.0)
        started = await _start(path, GatewayLimits(), options, LocalDirectory(), "node")
        fleet, accounts, server = started
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
                with pytest.raises(httpx.ConnectError):
                    await client.get("/healthz")
                is_serving_early = server.is_serving
                for _ in range(2):
                    await _set_table(fleet, server, RoutingTable(routes=(asleep,)))
                return is_serving_early, await client.get("/healthz")
        finally:
            await stop(server, accounts, fleet, 0.0)

    is_serving_early, response = asyncio.run(work())
    assert not is_serving_early
    assert response.status_code == 200
