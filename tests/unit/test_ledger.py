"""The ledger on SQLite and on PostgreSQL: teams, keys, peppers, versions."""

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_fakes import Clock
from sqlalchemy import event, select, text, update

from cluster.accounting import Answer, Batch, Key, Limits, Scope, Team
from cluster.errors import AccountError, ConfigError, LedgerError
from cluster.ledger import Ledger
from cluster.ledger_address import ledger_url, public_url
from cluster.ledger_database import _postgres_engine, reading, writing
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


def key_of(team: str, **changes: object) -> Key:
    return Key(id="", team=team, scopes=frozenset({Scope.INFERENCE})).replace(**changes)


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


def test_file_when_made_is_private_with_everything_beside_it(tmp_path: Path):
    path = tmp_path / "new" / "ledger.db"
    with Ledger.open(str(path)) as ledger:
        ledger.add_team(Team(name="a"))
        modes = {found.name: found.stat().st_mode & 0o777 for found in path.parent.iterdir()}
    assert {"ledger.db", "ledger.db.pepper", "ledger.db-wal"} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_file_when_read_alone_has_no_key(tmp_path: Path):
    path = tmp_path / "ledger.db"
    with Ledger.open(str(path)) as ledger:
        ledger.add_team(Team(name="a"))
        _, secret = ledger.new_key(key_of("a"))
    contents = b"".join(found.read_bytes() for found in tmp_path.iterdir())
    assert secret.encode() not in contents


def test_file_when_written_syncs_every_commit(tmp_path: Path):
    with Ledger.open(str(tmp_path / "ledger.db")) as ledger, ledger.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"


def test_file_when_pepper_is_lost_says_so(tmp_path: Path):
    path = tmp_path / "ledger.db"
    Ledger.open(str(path)).close()
    (tmp_path / "ledger.db.pepper").unlink()
    with pytest.raises(LedgerError, match=r"pepper is missing.*RAYSMITH_PEPPER"):
        Ledger.open(str(path))
    assert not (tmp_path / "ledger.db.pepper").exists()


def test_file_when_pepper_is_open_to_others_is_refused(tmp_path: Path):
    path = tmp_path / "ledger.db"
    Ledger.open(str(path)).close()
    (tmp_path / "ledger.db.pepper").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Ledger.open(str(path))


def test_pepper_when_too_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYSMITH_PEPPER", "short")
    with pytest.raises(ConfigError, match="fewer than 32"):
        Ledger.open(str(tmp_path / "ledger.db"))


def test_file_when_it_is_no_ledger_is_refused(tmp_path: Path):
    path = tmp_path / "ledger.db"
    path.write_text("teams: a\n" * 200)
    with pytest.raises(LedgerError, match="cannot be used as a ledger"):
        Ledger.open(str(path))


def replace_ledger(path: Path, team: str) -> None:
    """Put another ledger in the place of one that is in use."""
    other = path.parent / "other" / "ledger.db"
    with Ledger.open(str(other)) as ledger:
        ledger.add_team(Team(name=team))
    other.replace(path)


def test_file_when_replaced_is_not_read_any_more(tmp_path: Path):
    path = tmp_path / "ledger.db"
    with Ledger.open(str(path)) as ledger:
        ledger.add_team(Team(name="a"))
        reader = LedgerReader(ledger)
        replace_ledger(path, team="b")
        with pytest.raises(LedgerError, match=r"was replaced .*\. Restart .*gateway and steward"):
            reader.current()
        path.unlink()
        with pytest.raises(LedgerError, match="cannot be read"):
            reader.current()
        reader.close()


def test_file_when_replaced_is_not_charged_any_more(tmp_path: Path):
    path = tmp_path / "ledger.db"
    with Ledger.open(str(path)) as ledger:
        assert ledger.apply(Batch("w", 1)) == Answer()
        replace_ledger(path, team="b")
        with pytest.raises(LedgerError, match=r"was replaced .*\. Restart .*gateway and steward"):
            ledger.apply(Batch("w", 2))


def test_file_when_many_processes_open_it_first_has_one_pepper(tmp_path: Path):
    path = str(tmp_path / "ledger.db")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        names = [f"team-{i}" for i in range(8)]
        digests = pool.starmap(_add, [(path, name) for name in names])
    assert len(set(digests)) == 1
    with Ledger.open(path) as ledger:
        assert sorted(team.name for team in ledger.teams()) == names


def _add(path: str, name: str) -> str:
    with Ledger.open(path) as ledger:
        ledger.add_team(Team(name=name))
        return ledger.digest("x")


def test_file_when_another_writes_waits_for_it(tmp_path: Path):
    path = tmp_path / "ledger.db"
    with Ledger.open(str(path)) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert ledger.snapshot().teams == {}  # reading goes on
        other.execute("COMMIT")
        ledger.add_team(Team(name="a"))
        other.close()


# --- where it is -------------------------------------------------------------------------------


def test_url_when_nothing_is_given_is_in_the_state_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAYSMITH_LEDGER", raising=False)
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path))
    assert ledger_url().database == str(tmp_path / "ledger.db")
    monkeypatch.setenv("RAYSMITH_LEDGER", "postgresql://host/name")
    assert ledger_url().drivername == "postgresql+psycopg"


def test_url_when_path_is_relative_starts_from_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))
    expected = str(tmp_path / "runs/l.db")
    assert ledger_url("runs/l.db").database == expected
    assert ledger_url("sqlite:///runs/l.db").database == expected
    assert public_url("runs/l.db") == expected


@pytest.mark.parametrize("given", ["mysql://host/x", "sqlite://", "://"])
def test_url_when_unknown_is_refused(given: str):
    with pytest.raises(ConfigError, match="postgresql://HOST/NAME"):
        ledger_url(given)


def test_public_url_when_it_has_a_password_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="pgpass") as caught:
        public_url("postgresql://me:secret@host/name")
    assert "secret" not in caught.value.message


def test_public_url_when_the_environment_gives_it_names_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYSMITH_LEDGER", "postgresql://me:secret@host/name")
    assert public_url() is None


def test_server_when_it_does_not_answer_shows_no_password():
    with pytest.raises(LedgerError, match="cannot be used") as caught:
        Ledger.open("postgresql://me:secret@127.0.0.1:1/name?connect_timeout=2")
    assert "secret" not in caught.value.message


def test_server_when_connected_to_is_told_bounds_for_every_wait():
    url = "postgresql://host/name?connect_timeout=2&options=-csearch_path%3Dx"
    engine = _postgres_engine(ledger_url(url))
    told: dict[str, object] = {}

    @event.listens_for(engine, "do_connect")
    def refuse(dialect: object, record: object, args: object, settings: dict[str, object]) -> None:
        told.update(settings)
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    assert told["connect_timeout"] == "2"
    assert told["options"] == "-c statement_timeout=15000 -csearch_path=x"
    assert {"tcp_user_timeout", "keepalives_idle", "keepalives_count"} <= told.keys()


def test_server_when_a_statement_takes_too_long_ends_it(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path))
    server = request.getfixturevalue("postgres")
    with Ledger.open(server.new_ledger()) as ledger, ledger.engine.connect() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar_one() == "15s"


def test_file_when_opened_twice_here_loses_nothing_that_another_process_writes(tmp_path: Path):
    """A second opening must not drop the first one's locks, or the other would end the log."""
    path = str(tmp_path / "ledger.db")
    context = multiprocessing.get_context("spawn")
    with Ledger.open(path) as first:
        first.add_team(Team(name="a"))
        Ledger.open(path).close()
        for name in ("b", "c"):
            process = context.Process(target=_add, args=(path, name))
            process.start()
            process.join()
            first.add_team(Team(name=f"{name}-here"))
    with Ledger.open(path) as again:
        assert [team.name for team in again.teams()] == ["a", "b", "b-here", "c", "c-here"]
