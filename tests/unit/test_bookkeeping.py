"""Batches of charges and leases on SQLite and on PostgreSQL: once each, and never over a budget."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from ledger_fakes import Clock

from cluster.accounting import (
    WRITER_TTL_S,
    Account,
    Answer,
    Batch,
    Charge,
    Lease,
    Return,
    Team,
    Used,
    grant,
    hour_of,
    month_hours,
    month_of,
)
from cluster.errors import ConfigError
from cluster.ledger import Ledger

NOW_S = 1_795_000_000
MONTH = month_of(NOW_S)
ACCOUNT = Account(hour_of(NOW_S), MONTH, "a", "key-1", "tiny", "3")


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW_S)


@pytest.fixture
def ledger(any_ledger: str, clock: Clock) -> Iterator[Ledger]:
    with Ledger.open(any_ledger, clock=clock) as opened:
        opened.add_team(Team(name="a", tokens_per_month=1000))
        yield opened


def charge(tokens: int, *, account: Account = ACCOUNT) -> Charge:
    return Charge(account, Used(1, tokens - 1, 1, 0))


def returned(tokens: int, epoch: int = 0) -> Return:
    return Return("a", MONTH, epoch, tokens)


def lease(needed: int, wanted: int | None = None, *, epoch: int = 0) -> Lease:
    return Lease("a", MONTH, epoch, needed, needed if wanted is None else wanted)


def balance(ledger: Ledger) -> tuple[int, int]:
    found = ledger.balance(ledger.team("a"), MONTH)
    return found.spent, found.leased


def test_batch_when_repeated_gives_the_same_answer_and_changes_nothing(ledger: Ledger):
    batch = Batch("w", 1, charges=(charge(40),), leases=(lease(100),))
    first = ledger.apply(batch)
    assert first == ledger.apply(batch) == Answer((100,))
    assert balance(ledger) == (40, 100)
    (row,) = ledger.usage(month=MONTH, by=("team",))
    assert row.used == Used(1, 39, 1, 0)


def test_batch_when_older_than_the_last_is_not_written(ledger: Ledger):
    for sequence in (1, 2):
        ledger.apply(Batch("w", sequence, charges=(charge(10),)))
    assert ledger.apply(Batch("w", 1, charges=(charge(10),))) == Answer()
    assert balance(ledger) == (20, 0)


def test_batches_when_of_two_writers_are_both_written(ledger: Ledger):
    for writer in ("v", "w"):
        ledger.apply(Batch(writer, 1, charges=(charge(10),)))
    assert balance(ledger) == (20, 0)


def test_charge_when_paid_by_a_lease_makes_it_smaller(ledger: Ledger):
    ledger.apply(Batch("w", 1, leases=(lease(100),)))
    ledger.apply(Batch("w", 2, charges=(charge(30),), returns=(returned(30),)))
    assert balance(ledger) == (30, 70)


def test_return_when_given_back_can_be_leased_by_another(ledger: Ledger):
    assert ledger.apply(Batch("v", 1, leases=(lease(1000),))).granted == (1000,)
    assert ledger.apply(Batch("w", 1, leases=(lease(10),))).granted == (0,)
    ledger.apply(Batch("v", 2, returns=(returned(600),)))
    assert ledger.apply(Batch("w", 2, leases=(lease(10),))).granted == (10,)
    assert balance(ledger) == (0, 410)


def test_lease_when_its_writer_died_is_free_again(ledger: Ledger, clock: Clock):
    ledger.apply(Batch("v", 1, leases=(lease(1000),)))
    clock.now_s += WRITER_TTL_S
    assert ledger.apply(Batch("w", 1, leases=(lease(10),))).granted == (0,)
    clock.now_s += 1
    assert ledger.apply(Batch("w", 2, leases=(lease(10),))).granted == (10,)


def test_charge_when_its_lease_was_taken_back_is_written_nevertheless(ledger: Ledger, clock: Clock):
    ledger.apply(Batch("v", 1, leases=(lease(100),)))
    clock.now_s += WRITER_TTL_S + 1
    ledger.apply(Batch("w", 1))
    ledger.apply(Batch("v", 2, charges=(charge(30),), returns=(returned(30),)))
    assert balance(ledger) == (30, 0)


def test_return_when_its_lease_was_taken_back_leaves_a_newer_one(ledger: Ledger, clock: Clock):
    ledger.apply(Batch("v", 1, leases=(lease(600),)))
    clock.now_s += WRITER_TTL_S + 1
    ledger.apply(Batch("w", 1))
    ledger.apply(Batch("v", 2, leases=(lease(1000, epoch=1),)))
    ledger.apply(Batch("v", 3, returns=(returned(600, epoch=0),)))
    assert balance(ledger) == (0, 1000)


def test_lease_when_month_changes_is_of_a_new_budget(ledger: Ledger):
    ledger.apply(Batch("w", 1, leases=(lease(1000),)))
    other = Lease("a", "2026-12", 0, 1000, 1000)
    assert ledger.apply(Batch("w", 2, leases=(other,))).granted == (1000,)


def test_lease_when_the_budget_was_raised_gets_more(ledger: Ledger):
    ledger.apply(Batch("w", 1, leases=(lease(1000),)))
    ledger.change_team("a", lambda team: team.replace(tokens_per_month=1500))
    assert ledger.apply(Batch("w", 2, leases=(lease(800),))).granted == (500,)


def test_lease_when_its_team_is_unknown_gets_nothing(ledger: Ledger):
    unknown = Lease("nobody", MONTH, 0, 10, 320)
    assert ledger.apply(Batch("w", 1, leases=(unknown, lease(10)))).granted == (0, 10)


@pytest.mark.parametrize(
    ("remaining", "needed", "wanted", "expected"),
    [
        (None, 10, 320, 320),  # without a budget
        (10_000, 10, 320, 320),
        (1000, 10, 320, 250),  # a quarter of what is left
        (100, 30, 960, 30),  # near the end only what is needed
        (20, 30, 960, 20),
        (0, 30, 960, 0),
        (1000, 0, 320, 250),  # ahead of need
    ],
)
def test_grant_when_little_remains_gives_less_ahead_of_need(
    remaining: int | None, needed: int, wanted: int, expected: int
):
    assert grant(remaining, lease(needed, wanted)) == expected


def test_batches_when_many_writers_contend_never_exceed_the_budget(any_ledger: str, ledger: Ledger):
    """Random leases, charges and returns of four stewards at once, each batch sent twice."""

    def write(seed: int) -> int:
        rng, free, spent = random.Random(seed), 0, 0
        with Ledger.open(any_ledger, clock=lambda: float(NOW_S)) as own:
            for sequence in range(1, 16):
                used = rng.randint(0, free)
                back = rng.randint(0, free - used)
                batch = Batch(
                    f"w{seed}",
                    sequence,
                    charges=(charge(used),) if used else (),
                    returns=(returned(used + back),),
                    leases=(lease(rng.randint(0, 90), 120),),
                )
                answer = own.apply(batch)
                assert own.apply(batch) == answer
                free += sum(answer.granted) - used - back
                spent += used
                found = own.balance(own.team("a"), MONTH)
                assert found.spent + found.leased <= 1000
        return spent

    with ThreadPoolExecutor(4) as pool:
        spent = sum(pool.map(write, range(4)))
    assert ledger.balance(ledger.team("a"), MONTH).spent == spent
    assert sum(row.used.tokens for row in ledger.usage(month=MONTH, by=("key_id",))) == spent


# --- reports -----------------------------------------------------------------------------------


def test_usage_when_grouped_adds_up_the_rest(ledger: Ledger):
    accounts = [
        ACCOUNT,
        replace(ACCOUNT, hour=ACCOUNT.hour + 1),
        replace(ACCOUNT, version="4"),
        replace(ACCOUNT, team="b"),
    ]
    charges = tuple(charge(10, account=account) for account in accounts)
    ledger.apply(Batch("w", 1, charges=charges))
    by_team = ledger.usage(month=MONTH, by=("team",))
    assert [(row.team, row.used.num_requests) for row in by_team] == [("a", 3), ("b", 1)]
    by_version = ledger.usage(month=MONTH, by=("version", "model"), team="a")
    assert [(row.version, row.used.tokens) for row in by_version] == [("3", 20), ("4", 10)]
    assert [row.hour_s for row in ledger.usage(month=MONTH, by=("hour",))] == [
        3600 * ACCOUNT.hour,
        3600 * (ACCOUNT.hour + 1),
    ]
    assert ledger.usage(month="2026-10", by=("team",)) == []
    assert ledger.usage(month="2026-10", by=()) == []


@pytest.mark.parametrize(("month", "by"), [("2026-13", ("team",)), (MONTH, ("colour",))])
def test_usage_when_asked_for_nonsense_says_what_there_is(
    ledger: Ledger, month: str, by: tuple[str, ...]
):
    with pytest.raises(ConfigError, match=r"2026-11|Choose from"):
        ledger.usage(month=month, by=by)


def test_month_hours_when_december_end_with_the_year():
    first, end = month_hours("2026-12")
    assert end - first == 31 * 24
    assert month_of(3600 * first) == "2026-12"
    assert month_of(3600 * end) == "2027-01"
    assert month_of(3600 * end - 1) == "2026-12"
