"""How a gateway of Ray Serve ends."""

import asyncio

import pytest

from serving.gateway_deployment import stop


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
