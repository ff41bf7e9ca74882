"""Keys, limits and charges as a gateway sees them, over a real ledger."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_fakes import (
    QUICK,
    DeadSteward,
    FlakySteward,
    Service,
    refusal,
    spent,
)

from cluster.accounting import Limits, Scope
from cluster.ledger import Ledger, Snapshot
from serving.gateway.accounts import Principal, Spent
from serving.gateway.accounts_client import LedgerAccounts, SharedCheck
from serving.gateway.ledger_writer import Pace


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = Service(str(tmp_path / "ledger.db"))
    yield found
    found.ledger.close()


# --- keys --------------------------------------------------------------------------------------


def test_key_when_valid_names_its_team_scopes_and_models(any_ledger: str):
    service = Service(any_ledger, models=frozenset({"tiny"}))

    async def test(accounts: LedgerAccounts) -> None:
        found = await accounts.authenticate(service.secret)
        scopes, models = frozenset({Scope.INFERENCE}), frozenset({"tiny"})
        assert found == Principal(service.key.id, "a", scopes, models)

    service.run(test)
    service.ledger.close()


@pytest.mark.parametrize(
    "reason", ["unknown", "empty", "digest", "revoked", "expired", "suspended"]
)
def test_key_when_it_does_not_count_is_401_without_a_reason(any_ledger: str, reason: str):
    service = Service(any_ledger)
    _, other = service.new_key(expires_s=int(service.clock()) + 10)

    async def test(accounts: LedgerAccounts) -> None:
        await accounts.authenticate(service.secret)
        await accounts.authenticate(other)
        secret = service.secret
        if reason == "revoked":
            service.ledger.revoke_key(service.key.id)
        if reason == "suspended":
            service.ledger.change_team("a", lambda team: team.replace(is_suspended=True))
        if reason == "expired":
            service.clock.now_s += 10
            secret = other
        if reason in {"unknown", "empty", "digest"}:
            digest = service.ledger.digest(secret)
            secret = {"unknown": "rs-x", "empty": "", "digest": digest}[reason]
        refused = await refusal(accounts.authenticate(secret))
        assert (refused.status, refused.code) == (401, "invalid_api_key")
        assert not any(word in refused.message for word in ("revoked", "expired", "suspended"))

    service.run(test)
    service.ledger.close()


def test_keys_when_checked_together_are_all_right(any_ledger: str):
    service = Service(any_ledger)

    async def test(accounts: LedgerAccounts) -> None:
        found = await asyncio.gather(*(accounts.authenticate(service.secret) for _ in range(50)))
        assert {principal.team for principal in found} == {"a"}
        service.ledger.revoke_key(service.key.id)
        calls = [refusal(accounts.authenticate(service.secret)) for _ in range(50)]
        assert {refused.status for refused in await asyncio.gather(*calls)} == {401}

    service.run(test)
    service.ledger.close()


def test_key_when_the_ledger_is_gone_is_503(service: Service):
    async def test(accounts: LedgerAccounts) -> None:
        away = Path(service.url).rename(service.url + ".away")  # noqa: ASYNC240
        refused = await refusal(accounts.authenticate(service.secret))
        assert (refused.status, refused.retry_after_s) == (503, 1)
        away.rename(service.url)
        await accounts.authenticate(service.secret)

    service.run(test)


def test_key_when_the_server_was_restarted_is_checked_again(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path))
    postgres = request.getfixturevalue("postgres")
    service = Service(postgres.new_ledger())

    async def test(accounts: LedgerAccounts) -> None:
        await accounts.authenticate(service.secret)
        postgres.disconnect_all()
        await accounts.authenticate(service.secret)

    service.run(test)
    service.ledger.close()


class HangingReader:
    """A server that answers when it is told to."""

    is_local = False

    def __init__(self, ledger: Ledger) -> None:
        self.answers = threading.Event()
        self.num_asked = 0
        self._ledger = ledger

    def current(self) -> Snapshot:
        self.num_asked += 1
        self.answers.wait()
        return self._ledger.snapshot()


def test_key_when_the_server_does_not_answer_is_503_and_checked_once_it_does(service: Service):
    reader = HangingReader(service.ledger)

    async def test(accounts: LedgerAccounts) -> None:
        accounts._checks = SharedCheck(reader, timeout_s=0.2)
        try:
            calls = [refusal(accounts.authenticate(service.secret)) for _ in range(5)]
            refused = await asyncio.gather(*calls)
            assert {(one.status, one.retry_after_s) for one in refused} == {(503, 1)}
            assert (await refusal(accounts.authenticate(service.secret))).status == 503
            assert reader.num_asked == 1
        finally:
            reader.answers.set()
        await accounts.authenticate(service.secret)

    service.run(test)


# --- limits ------------------------------------------------------------------------------------


def test_reserve_when_a_limit_is_raised_holds_at_once(service: Service):
    service.ledger.change_team("a", lambda t: t.replace(limits=Limits(requests_per_min=1)))

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        (await accounts.reserve(principal, 10, 1)).settle(None)
        refused = await refusal(accounts.reserve(principal, 10, 1))
        assert (refused.status, refused.retry_after_s) == (429, 61)
        assert "team `a` may use 1 requests a minute" in refused.message
        service.ledger.change_team("a", lambda t: t.replace(limits=Limits(requests_per_min=2)))
        principal = await accounts.authenticate(service.secret)
        await accounts.reserve(principal, 10, 1)

    service.run(test)


def test_reserve_when_the_key_has_limits_names_the_key(service: Service):
    limited, secret = service.new_key(limits=Limits(max_choices=2))

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(secret)
        held = await accounts.reserve(principal, 10, 2)
        assert limited.id in (await refusal(accounts.reserve(principal, 10, 1))).message
        await accounts.reserve(await accounts.authenticate(service.secret), 10, 1)
        held.settle(None)
        await accounts.reserve(principal, 10, 2)

    service.run(test)


def test_reserve_when_the_key_was_revoked_meanwhile_is_401(service: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        service.ledger.revoke_key(service.key.id)
        await refusal(accounts.authenticate(service.secret))
        assert (await refusal(accounts.reserve(principal, 1, 1))).status == 401

    service.run(test)


# --- charges -----------------------------------------------------------------------------------


def test_settle_when_called_twice_charges_once(service: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        held = await accounts.reserve(principal, 100, 1)
        held.settle(Spent("tiny", "3", 30, 10, 16))
        held.settle(Spent("tiny", "3", 30, 10, 16))
        held.settle(None)
        document = await accounts.usage("a")
        assert document["data"] == [
            {
                "model": "tiny",
                "version": "3",
                "num_requests": 1,
                "prompt_tokens": 30,
                "cached_tokens": 16,
                "generated_tokens": 10,
            }
        ]
        assert document["budget"] == {
            "tokens_per_month": None,
            "spent_tokens": 40,
            "leased_tokens": 0,
            "remaining_tokens": None,
        }

    service.run(test)


def test_charges_when_many_gather_go_in_one_batch(service: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        for _ in range(500):
            (await accounts.reserve(principal, 10, 1)).settle(spent(7))

    service.run(test)
    assert service.num_requests == 500
    assert len(service.steward.batches) == 1


def test_team_without_a_budget_when_the_steward_is_away_is_served(
    service: Service, caplog: pytest.LogCaptureFixture
):
    service.steward = DeadSteward()

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        for _ in range(3):
            (await accounts.reserve(principal, 10, 1)).settle(spent(7))

    with caplog.at_level(logging.ERROR):
        service.run(test, QUICK)
    assert "21 tokens are not charged" in caplog.text


@pytest.mark.parametrize("budget", [None, 10**6])
def test_charges_when_calls_are_lost_are_written_exactly_once(tmp_path: Path, budget: int | None):
    service = Service(str(tmp_path / "ledger.db"), tokens_per_month=budget)
    service.steward = FlakySteward(service.ledger)

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        for _ in range(60):
            (await accounts.reserve(principal, 100, 1)).settle(spent(50))
            await asyncio.sleep(0.001)

    service.run(test, Pace(gather_s=0.001, first_retry_s=0.001))
    assert service.balance == (60 * 50, 0)
    assert service.num_requests == 60
    assert len(service.steward.batches) > 5
    service.ledger.close()


def test_usage_when_the_team_is_unknown_is_404(service: Service):
    async def test(accounts: LedgerAccounts) -> None:
        assert (await refusal(accounts.usage("b"))).status == 404

    service.run(test)
