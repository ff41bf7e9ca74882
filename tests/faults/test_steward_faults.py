"""A steward that is killed again and again while gateways charge and lease through it."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster.accounting import Key, Scope, Team, month_of
from cluster.ledger import Ledger
from cluster.session import HeadConfig, connect, start_head, stop_head
from cluster.steward import NAMESPACE, RemoteSteward, start_steward, steward_name
from serving.gateway.accounts import Spent
from serving.gateway.accounts_client import LedgerAccounts
from serving.gateway.errors import RefusedError

pytestmark = [pytest.mark.ray]

BUDGET, NUM_TOKENS, NUM_CALLS = 3000, 10, 400
NUM_KILLS = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("steward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSMITH_STATE", str(folder))
        patch.setenv("RAYSMITH_HOME", str(folder))
        for name in ("RAY_ADDRESS", "RAYSMITH_LEDGER", "RAYSMITH_PEPPER"):
            patch.delenv(name, raising=False)
        ports = {"gcs_port": 0, "dashboard_port": 0, "serve_port": 0}
        session = start_head(HeadConfig(name="steward", num_cpus=1, **ports))
        try:
            connect(session)
            yield folder
        finally:
            ray.shutdown()
            stop_head(session)


async def gateway(url: str, secrets: dict[str, str], served: dict[str, int]) -> None:
    """Send calls of both teams, some at a time, and count those that were served."""
    accounts = LedgerAccounts(url, RemoteSteward(url))

    async def call(team: str) -> None:
        principal = await accounts.authenticate(secrets[team])
        while True:
            try:
                held = await accounts.reserve(principal, NUM_TOKENS, 1)
            except RefusedError as error:
                if error.refused.status == 429:
                    return
                continue  # the steward was away for longer than a request waits
            await asyncio.sleep(0.01)
            held.settle(Spent("tiny", "1", NUM_TOKENS - 1, 1))
            served[team] += 1
            return

    for _ in range(0, NUM_CALLS, 20):
        calls = [call(team) for team in secrets for _ in range(10)]
        await asyncio.gather(*calls)
        await asyncio.sleep(0.2)
    await accounts.aclose()


async def kill_steward() -> None:
    """Kill the steward's process some time after it began to answer, again and again."""
    killed: set[int] = set()
    while len(killed) < NUM_KILLS:
        await asyncio.sleep(0.5)
        pid = await asyncio.to_thread(steward_pid)
        if pid is not None and pid not in killed:
            await asyncio.sleep(0.7)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)


def steward_pid() -> int | None:
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::Steward"):
            return int(process.pid)
    return None


@pytest.mark.timeout(120)
def test_steward_when_killed_repeatedly_loses_and_doubles_no_charge(cluster: Path):
    url = str(cluster / "faults.db")
    with Ledger.open(url) as ledger:
        ledger.add_team(Team(name="budgeted", tokens_per_month=BUDGET))
        ledger.add_team(Team(name="free"))
        scopes = frozenset({Scope.INFERENCE})
        secrets = {
            team: ledger.new_key(Key(id="", team=team, scopes=scopes))[1]
            for team in ("budgeted", "free")
        }
        served = dict.fromkeys(secrets, 0)

        async def run() -> None:
            calls = [gateway(url, secrets, served) for _ in range(2)]
            await asyncio.gather(kill_steward(), *calls)

        asyncio.run(run())
        month = month_of(time.time())
        found = {team: ledger.balance(ledger.team(team), month) for team in secrets}
        usage = {row.team: row.used for row in ledger.usage(month=month, by=("team",))}
    assert served["free"] == NUM_CALLS
    for team, count in served.items():
        assert (found[team].spent, found[team].leased) == (NUM_TOKENS * count, 0)
        assert (usage[team].num_requests, usage[team].tokens) == (count, NUM_TOKENS * count)
    assert 0 < found["budgeted"].spent <= BUDGET


def test_steward_when_asked_for_twice_is_one_and_outlives_its_driver(cluster: Path):
    url = str(cluster / "twice.db")
    first, second = start_steward(url), start_steward(url)
    assert first == second
    assert ray.get_actor(steward_name(url), NAMESPACE) == first
    assert steward_name(url) != steward_name(str(cluster / "other.db"))
