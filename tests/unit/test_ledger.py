"""The ledger on SQLite and on PostgreSQL: teams, keys, versions."""

import threading
from collections.abc import Iterator

import pytest
from ledger_fakes import Clock, key_of
from sqlalchemy import select, update

from cluster.accounting import Limits, Team
from cluster.errors import AccountError, ConfigError, LedgerError
from cluster.ledger import Ledger
from cluster.ledger_database import reading, writing
from cluster.ledger_reader import LedgerReader
from cluster.ledger_schema import keys, state, teams

NOW_S = 1_795_000_000  # 2026-11-18


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW_S)


@pytest.fixture
def ledger(any_ledger: str, clock: Clock) -> Iterator[Ledger]:
    with Ledger.open(any_ledger, clock=clock) as opened:
        yield opened


def test_team_when_added_is_read_back_whole(ledger: Ledger):
    limits = Limits(requests_per_min=5, tokens_per_min=2**40, max_choices=3)
    team = Team(name="a", limits=limits, tokens_per_month=0, models=frozenset({"x", "y"}))
    ledger.add_team(team)
    assert ledger.team("a") == team.replace(created_s=NOW_S)


def test_team_when_added_twice_is_refused(ledger: Ledger):
    ledger.add_team(Team(name="a"))
    with pytest.raises(AccountError, match=r"team `a` already.*teams set"):
        ledger.add_team(Team(name="a"))


def test_team_when_unknown_lists_those_there_are(ledger: Ledger):
    ledger.add_team(Team(name="a"))
    with pytest.raises(AccountError, match=r"no team `b` \(there is: `a`\)"):
        ledger.team("b")


def test_team_when_changed_keeps_the_rest(ledger: Ledger):
    ledger.add_team(Team(name="a", tokens_per_month=7))
    ledger.change_team("a", lambda team: team.replace(is_suspended=True))
    assert ledger.team("a").tokens_per_month == 7
    assert ledger.team("a").is_suspended


def test_team_when_two_change_it_at_once_keeps_both_changes(any_ledger: str, ledger: Ledger):
    ledger.add_team(Team(name="a"))
    with Ledger.open(any_ledger) as second:
        suspend = ("a", lambda team: team.replace(is_suspended=True))
        other = threading.Thread(target=second.change_team, args=suspend)

        def change(team: Team) -> Team:
            other.start()
            other.join(0.5)  # Held up; or through, with a change that this one undoes.
            return team.replace(tokens_per_month=7)

        ledger.change_team("a", change)
        other.join()
    found = ledger.team("a")
    assert (found.tokens_per_month, found.is_suspended) == (7, True)


@pytest.mark.parametrize("name", ["", "a b", "../a", "a\n", "x" * 200])
def test_team_when_name_is_unsafe_is_refused(name: str):
    with pytest.raises(ConfigError, match="not allowed"):
        Team(name=name)


def test_key_when_made_is_found_by_its_digest_only(ledger: Ledger):
    ledger.add_team(Team(name="a"))
    made, secret = ledger.new_key(key_of("a", label="x", expires_s=NOW_S + 5))
    snapshot = ledger.snapshot()
    assert snapshot.by_digest[ledger.digest(secret)] == made
    assert secret.startswith("rs-")
    assert secret not in snapshot.by_digest
    assert ledger.digest(ledger.digest(secret)) not in snapshot.by_digest


def test_key_when_team_is_unknown_is_refused(ledger: Ledger):
    with pytest.raises(AccountError, match="no team `a`"):
        ledger.new_key(key_of("a"))


@pytest.mark.parametrize(
    ("expires_s", "is_valid"), [(None, True), (NOW_S, False), (NOW_S + 1, True)]
)
def test_key_when_it_ends_is_invalid_from_that_second(expires_s: int | None, *, is_valid: bool):
    assert key_of("a", expires_s=expires_s).is_valid(NOW_S) is is_valid


def test_key_when_revoked_is_invalid_and_stays_so(ledger: Ledger, clock: Clock):
    ledger.add_team(Team(name="a"))
    made, _ = ledger.new_key(key_of("a"))
    ledger.revoke_key(made.id)
    clock.now_s += 10
    again = ledger.revoke_key(made.id)
    assert again.revoked_s == NOW_S
    assert not again.is_valid(NOW_S)


def test_key_when_rotated_gives_another_and_ends_after_the_overlap(ledger: Ledger):
    ledger.add_team(Team(name="a"))
    limits = Limits(max_choices=2)
    old, old_secret = ledger.new_key(key_of("a", limits=limits, expires_s=NOW_S + 1000))
    ended, new, new_secret = ledger.rotate_key(old.id, overlap_s=60)
    found = ledger.snapshot().keys
    assert found[old.id] == ended
    assert ended.expires_s == NOW_S + 60
    assert (found[new.id].expires_s, found[new.id].limits) == (NOW_S + 1000, limits)
    assert old_secret != new_secret


def test_key_when_rotated_never_lives_longer_than_it_was_to(ledger: Ledger):
    ledger.add_team(Team(name="a"))
    old, _ = ledger.new_key(key_of("a", expires_s=NOW_S + 10))
    ended, _, _ = ledger.rotate_key(old.id, overlap_s=60)
    assert ended == ledger.snapshot().keys[old.id]
    assert ended.expires_s == NOW_S + 10


def test_key_when_revoked_cannot_be_rotated(ledger: Ledger):
    ledger.add_team(Team(name="a"))
    made, _ = ledger.new_key(key_of("a"))
    ledger.revoke_key(made.id)
    with pytest.raises(AccountError, match="revoked or expired"):
        ledger.rotate_key(made.id, overlap_s=60)


def test_key_when_revoked_while_it_is_rotated_has_no_successor(any_ledger: str, ledger: Ledger):
    ledger.add_team(Team(name="a"))
    made, _ = ledger.new_key(key_of("a"))
    refusals: list[str] = []
    with Ledger.open(any_ledger, clock=Clock(NOW_S)) as second:

        def rotate() -> None:
            try:
                second.rotate_key(made.id, overlap_s=60)
            except AccountError as error:
                refusals.append(error.message)

        other = threading.Thread(target=rotate)
        with writing(ledger.engine) as connection:
            rows = update(keys).where(keys.c.id == made.id)
            connection.execute(rows.values(revoked_s=NOW_S))
            other.start()
            other.join(0.5)  # Held up until this is committed.
        other.join()
    assert [made.id in message for message in refusals] == [True]
    assert list(ledger.snapshot().keys) == [made.id]


def test_key_when_rotated_twice_gives_keys_that_never_end_either(ledger: Ledger, clock: Clock):
    ledger.add_team(Team(name="a"))
    old, _ = ledger.new_key(key_of("a"))
    _, first, _ = ledger.rotate_key(old.id, overlap_s=60)
    clock.now_s += 10
    _, second, _ = ledger.rotate_key(old.id, overlap_s=60)
    found = ledger.snapshot().keys
    assert [found[key.id].expires_s for key in (old, first, second)] == [NOW_S + 60, None, None]


def test_key_when_rotated_twice_gives_keys_that_live_as_long_as_it_was_to(
    ledger: Ledger, clock: Clock
):
    ledger.add_team(Team(name="a"))
    old, _ = ledger.new_key(key_of("a", expires_s=NOW_S + 1000))
    ledger.rotate_key(old.id, overlap_s=60)
    clock.now_s += 10
    _, second, _ = ledger.rotate_key(old.id, overlap_s=60)
    _, third, _ = ledger.rotate_key(second.id, overlap_s=60)
    assert (second.expires_s, third.expires_s) == (NOW_S + 1010, NOW_S + 1010)


def test_ledger_when_made_before_rotations_were_kept_is_used(any_ledger: str, ledger: Ledger):
    ledger.add_team(Team(name="a"))
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE rotations")
    with Ledger.open(any_ledger, clock=Clock(NOW_S)) as again:
        made, _ = again.new_key(key_of("a"))
        assert again.rotate_key(made.id, overlap_s=60).new.expires_s is None


def test_reading_when_something_changes_meanwhile_sees_one_state(any_ledger: str, ledger: Ledger):
    with Ledger.open(any_ledger) as other, reading(ledger.engine) as connection:
        before = connection.execute(select(state.c.revision)).scalar_one()
        other.add_team(Team(name="a"))
        assert connection.execute(select(teams.c.name)).all() == []
    assert ledger.snapshot().revision == before + 1


@pytest.mark.parametrize("change", ["team", "suspend", "key", "rotate", "revoke"])
def test_reader_when_anything_changed_elsewhere_sees_it_at_once(
    any_ledger: str, ledger: Ledger, change: str
):
    ledger.add_team(Team(name="a"))
    made, _ = ledger.new_key(key_of("a"))
    with Ledger.open(any_ledger) as other:
        reader = LedgerReader(other)
        before = reader.current()
        assert reader.current() is before
        changes = {
            "team": lambda: ledger.add_team(Team(name="b")),
            "suspend": lambda: ledger.change_team("a", lambda t: t.replace(is_suspended=True)),
            "key": lambda: ledger.new_key(key_of("a")),
            "rotate": lambda: ledger.rotate_key(made.id, overlap_s=1),
            "revoke": lambda: ledger.revoke_key(made.id),
        }
        changes[change]()
        assert reader.current() != before
        reader.close()


def test_ledger_when_its_pepper_is_another_is_refused(
    any_ledger: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSMITH_PEPPER", "x" * 40)
    with pytest.raises(LedgerError, match="another pepper"):
        Ledger.open(any_ledger)


def test_ledger_when_newer_is_refused(any_ledger: str, ledger: Ledger):
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ledger SET version = 2")
    with pytest.raises(LedgerError, match=r"has version 2.*up to 1.*Upgrade"):
        Ledger.open(any_ledger)


# --- a file ------------------------------------------------------------------------------------
