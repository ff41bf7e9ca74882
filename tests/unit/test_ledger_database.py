"""Where a ledger is and how it is opened: files, peppers, addresses, servers."""

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from ledger_fakes import key_of
from sqlalchemy import event, text

from cluster.accounting import Answer, Batch, Team
from cluster.errors import ConfigError, LedgerError
from cluster.ledger import Ledger
from cluster.ledger_address import ledger_url, public_url
from cluster.ledger_database import _postgres_engine
from cluster.ledger_reader import LedgerReader


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
