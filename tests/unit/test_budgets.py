"""Token budgets as a gateway sees them, over a real ledger."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_fakes import (
    QUICK,
    DeadSteward,
    FakeSteward,
    Service,
    refusal,
    spent,
)

from cluster.accounting import WRITER_TTL_S, Limits, Return, Team, month_of
from serving.gateway.accounts_client import LedgerAccounts
from serving.gateway.budgets import REQUESTS_PER_LEASE, Budgets, Held
from serving.gateway.errors import RefusedError
from serving.gateway.ledger_writer import Pace


@pytest.fixture
def budgeted(tmp_path: Path) -> Iterator[Service]:
    """A team with 10,000 tokens a month."""
    found = Service(str(tmp_path / "ledger.db"), tokens_per_month=10_000)
    yield found
    found.ledger.close()


@pytest.mark.parametrize("num_gateways", [1, 3])
def test_budget_when_200_calls_are_parallel_is_never_overspent(any_ledger: str, num_gateways: int):
    service = Service(any_ledger, tokens_per_month=10_000)
    served, refused = [], []

    async def call(accounts: LedgerAccounts, number: int) -> None:
        principal = await accounts.authenticate(service.secret)
        try:
            held = await accounts.reserve(principal, 100, 1)
        except RefusedError as error:
            refused.append(error.refused)
            return
        await asyncio.sleep(0)
        held.settle(spent(100))
        served.append(number)

    async def run() -> None:
        stewards = [FakeSteward(service.ledger) for _ in range(num_gateways)]
        gateways = [LedgerAccounts(any_ledger, steward) for steward in stewards]
        await asyncio.gather(*(call(gateways[n % num_gateways], n) for n in range(200)))
        for gateway in gateways:
            await gateway.aclose()

    asyncio.run(run())
    month = month_of(time.time())
    found = service.ledger.balance(service.ledger.team("a"), month)
    assert (found.spent, found.leased) == (100 * len(served), 0)
    assert len(served) <= 100
    assert len(served) == 100 or num_gateways > 1
    assert {r.code for r in refused} == {"insufficient_quota"}
    assert "budget of 10000 tokens" in refused[0].message
    service.ledger.close()


def test_budget_when_requests_use_less_serves_more_of_them(budgeted: Service):
    served = 0

    async def test(accounts: LedgerAccounts) -> None:
        nonlocal served
        principal = await accounts.authenticate(budgeted.secret)
        while True:
            try:
                held = await accounts.reserve(principal, 100, 1)
            except RefusedError:
                return
            held.settle(spent(10))
            served += 1

    budgeted.run(test)
    assert served == 991  # the last one that fits: 9,900 spent, 100 left
    assert budgeted.balance == (9910, 0)


def test_budget_when_leased_ahead_needs_few_batches(tmp_path: Path):
    service = Service(str(tmp_path / "ledger.db"), tokens_per_month=10**9)

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        for _ in range(640):
            (await accounts.reserve(principal, 100, 1)).settle(spent(100))

    service.run(test)
    assert len(service.steward.batches) < 640 / REQUESTS_PER_LEASE * 3
    assert service.balance == (64_000, 0)
    service.ledger.close()


def test_budget_when_more_was_used_than_held_is_charged_in_full(budgeted: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(budgeted.secret)
        (await accounts.reserve(principal, 100, 1)).settle(spent(9_990))
        assert (await refusal(accounts.reserve(principal, 100, 1))).status == 429

    budgeted.run(test)
    assert budgeted.balance == (9_990, 0)


def test_budget_when_raised_serves_again_at_once(budgeted: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(budgeted.secret)
        await refusal(accounts.reserve(principal, 10_001, 1))
        change = {"tokens_per_month": 20_000}
        budgeted.ledger.change_team("a", lambda team: team.replace(**change))
        principal = await accounts.authenticate(budgeted.secret)
        (await accounts.reserve(principal, 10_001, 1)).settle(None)

    budgeted.run(test)


def test_budget_when_refused_gives_the_limits_back(tmp_path: Path):
    limits = Limits(requests_per_min=1, tokens_per_min=500, max_choices=1)
    service = Service(str(tmp_path / "ledger.db"), tokens_per_month=100, limits=limits)

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(service.secret)
        for _ in range(3):
            refused = await refusal(accounts.reserve(principal, 101, 1))
            assert refused.code == "insufficient_quota"
        await accounts.reserve(principal, 100, 1)

    service.run(test)
    service.ledger.close()


def test_budget_when_the_steward_does_not_answer_is_503(
    budgeted: Service,
):
    budgeted.steward = DeadSteward()

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(budgeted.secret)
        refused = await refusal(accounts.reserve(principal, 10, 1))
        assert (refused.status, refused.retry_after_s) == (503, 1)

    budgeted.run(test, QUICK)


def test_budget_when_a_waiting_call_is_cancelled_holds_nothing(budgeted: Service):
    async def test(accounts: LedgerAccounts) -> None:
        budgeted.steward.held = asyncio.Event()
        principal = await accounts.authenticate(budgeted.secret)
        calls = [asyncio.create_task(accounts.reserve(principal, 100, 1)) for _ in range(9)]
        await asyncio.sleep(0.01)
        for call in calls[:8]:
            call.cancel()
        budgeted.steward.held.set()
        (await calls[8]).settle(spent(60))
        await asyncio.gather(*calls[:8], return_exceptions=True)

    budgeted.run(test)
    assert budgeted.balance == (60, 0)


TEAM = Team(name="a", tokens_per_month=10_000)


def grant_all(budgets: Budgets) -> None:
    leases = budgets.leases()
    budgets.granted(leases, [lease.wanted for lease in leases])


def test_take_when_cancelled_as_it_is_granted_ends_and_gives_the_tokens_back():
    async def test() -> None:
        budgets = Budgets(lambda: None)
        call = asyncio.create_task(budgets.take(TEAM, "2026-11", 100))
        await asyncio.sleep(0)
        grant_all(budgets)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        budgets.close()
        assert budgets.returns() == [Return("a", "2026-11", 0, 100 * REQUESTS_PER_LEASE)]

    asyncio.run(test())


def test_take_when_cancelled_before_it_is_granted_leaves_the_tokens_to_the_next():
    async def test() -> None:
        budgets = Budgets(lambda: None)
        calls = [asyncio.create_task(budgets.take(TEAM, "2026-11", 100)) for _ in range(2)]
        await asyncio.sleep(0)
        calls[0].cancel()
        grant_all(budgets)
        held = await calls[1]
        assert calls[0].cancelled()
        held.settle(100)
        budgets.close()
        assert budgets.returns() == [Return("a", "2026-11", 0, 100 * REQUESTS_PER_LEASE)]

    asyncio.run(test())


def test_take_when_the_time_ends_as_it_is_granted_is_503_and_gives_the_tokens_back():
    async def test() -> None:
        loop = asyncio.get_running_loop()
        # Asked for before the wait begins, so the grant comes just before the wait's end.
        budgets = Budgets(
            lambda: grants.append(loop.call_soon(grant_all, budgets)), wait_timeout_s=0
        )
        grants: list[asyncio.Handle] = []
        refused = await refusal(budgets.take(TEAM, "2026-11", 100))
        assert refused.status == 503
        budgets.close()
        assert budgets.returns() == [Return("a", "2026-11", 0, 100 * REQUESTS_PER_LEASE)]

    asyncio.run(test())


MONTH = "2026-11"


async def take(budgets: Budgets, num_tokens: int) -> "asyncio.Task[Held]":
    """Begin to take tokens."""
    call = asyncio.create_task(budgets.take(TEAM, MONTH, num_tokens))
    await asyncio.sleep(0)
    return call


async def with_tokens(budgets: Budgets, *, held: int, free: int) -> Held:
    """Have tokens leased, of which a request holds some."""
    call = await take(budgets, held)
    budgets.granted(budgets.leases(), [held + free])
    return await call


def test_take_when_tokens_come_back_is_not_overtaken_by_a_smaller_request():
    async def test() -> None:
        asked: list[None] = []
        budgets = Budgets(lambda: asked.append(None))
        held = await with_tokens(budgets, held=100, free=60)
        large = await take(budgets, 200)
        leases = budgets.leases()
        small = await take(budgets, 50)
        held.settle(99)  # With the one that comes back there are 61.
        await asyncio.sleep(0)
        assert not small.done()
        asked.clear()
        assert leases[0].needed == 140
        budgets.granted(leases, [140])
        assert (await large).num_tokens == 200
        assert asked
        budgets.granted(budgets.leases(), [49])
        assert (await small).num_tokens == 50

    asyncio.run(test())


def test_take_when_what_was_asked_for_it_was_spent_meanwhile_is_asked_for_again():
    async def test() -> None:
        asked: list[None] = []
        budgets = Budgets(lambda: asked.append(None))
        held = await with_tokens(budgets, held=100, free=60)
        call = await take(budgets, 200)
        leases = budgets.leases()
        held.settle(150)  # More than it held: 50 of the 60.
        asked.clear()
        budgets.granted(leases, [140])
        assert asked
        (lease,) = budgets.leases()
        assert lease.needed == 50
        budgets.granted([lease], [50])
        assert (await call).num_tokens == 200

    asyncio.run(test())


def test_take_when_the_ledger_has_too_little_for_one_serves_the_next():
    async def test() -> None:
        budgets = Budgets(lambda: None)
        large, small, larger = [await take(budgets, tokens) for tokens in (5000, 100, 1000)]
        budgets.granted(budgets.leases(), [1000])
        assert (await refusal(large)).code == "insufficient_quota"
        assert (await small).num_tokens == 100
        assert (await refusal(larger)).code == "insufficient_quota"

    asyncio.run(test())


def test_take_when_the_one_before_it_gives_up_goes_on_with_what_there_is():
    async def test() -> None:
        budgets = Budgets(lambda: None)
        await with_tokens(budgets, held=100, free=60)
        large = await take(budgets, 200)
        small = await take(budgets, 50)
        assert not small.done()
        large.cancel()
        assert (await small).num_tokens == 50

    asyncio.run(test())


def test_budget_when_the_ledger_was_silent_for_long_is_leased_anew(
    budgeted: Service,
):
    """Leases that the ledger may have given to others are not spent."""

    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(budgeted.secret)
        held = await accounts.reserve(principal, 100, 1)
        working, dead = budgeted.steward.apply, DeadSteward().apply
        budgeted.steward.apply = dead
        (await accounts.reserve(principal, 100, 1)).settle(spent(10))
        budgeted.monotonic.now_s += WRITER_TTL_S
        await asyncio.sleep(0.02)
        budgeted.steward.apply = working
        held.settle(spent(60))

    budgeted.run(test, Pace(gather_s=0.001, first_retry_s=0.001))
    assert budgeted.balance == (70, 0)


def test_month_when_it_ends_starts_a_new_budget(budgeted: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(budgeted.secret)
        old = await accounts.reserve(principal, 10_000, 1)
        budgeted.clock.now_s += 31 * 24 * 3600
        new = await accounts.reserve(principal, 10_000, 1)
        old.settle(spent(4_000))
        new.settle(spent(5_000))

    first = budgeted.month
    budgeted.run(test)
    assert budgeted.balance == (5_000, 0)
    assert budgeted.ledger.balance(budgeted.ledger.team("a"), first).spent == 4_000


def test_settle_when_nothing_was_used_charges_nothing(budgeted: Service):
    async def test(accounts: LedgerAccounts) -> None:
        principal = await accounts.authenticate(budgeted.secret)
        (await accounts.reserve(principal, 100, 1)).settle(None)

    budgeted.run(test)
    assert budgeted.balance == (0, 0)
    assert budgeted.num_requests == 0
