"""`raysmith teams`, `keys` and `usage`, called as a person would."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

import raysmith
from cluster.accounting import Account, Batch, Charge, Used, hour_of, month_of
from cluster.ledger import Ledger
from cluster.ledger_database import writing
from cluster.ledger_schema import teams
from raysmith_accounts.options import when


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYSMITH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))
    for name in ("RAYSMITH_LEDGER", "RAYSMITH_PEPPER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "state"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed and return its standard output."""
    assert raysmith.main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def listed(capsys: pytest.CaptureFixture[str], what: str) -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = json.loads(run(capsys, what, "list", "--json"))[what]
    return documents


def test_key_when_made_is_the_only_output_and_is_kept_nowhere(capsys, state: Path):
    run(capsys, "teams", "add", "me")
    secret = run(capsys, "keys", "new", "me").strip()
    assert secret.startswith("rs-")
    contents = b"".join(path.read_bytes() for path in state.iterdir())
    assert secret.encode() not in contents
    assert secret not in json.dumps(listed(capsys, "keys"))
    with Ledger.open() as ledger:
        assert ledger.snapshot().by_digest[ledger.digest(secret)].team == "me"


def test_key_when_made_takes_scopes_limits_and_an_end(capsys):
    run(capsys, "teams", "add", "me")
    options = ["--scope", "metrics", "--scope", "admin", "--max-choices", "3"]
    run(capsys, "keys", "new", "me", *options, "--expires-in-days", "2", "--label", "x")
    (key,) = listed(capsys, "keys")
    assert sorted(key["scopes"]) == ["admin", "metrics"]
    assert (key["limits"]["max_choices"], key["label"]) == (3, "x")
    assert key["expires_s"] == pytest.approx(time.time() + 2 * 86400, abs=60)


def test_key_when_rotated_and_revoked_is_listed_so(capsys):
    run(capsys, "teams", "add", "me")
    first = run(capsys, "keys", "new", "me")
    (key,) = listed(capsys, "keys")
    second = run(capsys, "keys", "rotate", key["id"], "--overlap-hours", "1")
    assert first != second
    run(capsys, "keys", "revoke", key["id"])
    shown = {listed["id"]: listed for listed in listed(capsys, "keys")}
    assert shown.pop(key["id"])["revoked_s"] is not None
    (new,) = shown.values()
    assert (new["revoked_s"], new["expires_s"]) == (None, None)
    assert "revoked" in run(capsys, "keys", "list")


def test_key_when_rotated_says_when_the_old_one_ends(capsys):
    run(capsys, "teams", "add", "me")
    run(capsys, "keys", "new", "me", "--expires-in-days", "0.01")
    (key,) = listed(capsys, "keys")
    assert raysmith.main(["keys", "rotate", key["id"]]) == 0
    said = capsys.readouterr().err
    assert f"the old key `{key['id']}` ends {when(key['expires_s'])}" in said


def test_key_when_its_label_looks_like_markup_is_listed_as_it_is(capsys):
    run(capsys, "teams", "add", "me")
    run(capsys, "keys", "new", "me", "--label", "[/red]")
    assert "[/red]" in run(capsys, "keys", "list")


def test_team_when_set_changes_what_is_named_only(capsys):
    run(capsys, "teams", "add", "me", "--tokens-per-month", "1_000", "--max-choices", "4")
    run(capsys, "teams", "set", "me", "--model", "tiny", "--tokens-per-min", "50")
    (team,) = listed(capsys, "teams")
    assert (team["tokens_per_month"], team["remaining"], team["models"]) == (1000, 1000, ["tiny"])
    assert team["limits"] == {"requests_per_min": None, "tokens_per_min": 50, "max_choices": 4}
    run(capsys, "teams", "set", "me", "--tokens-per-month", "none", "--model", "all")
    (team,) = listed(capsys, "teams")
    assert (team["tokens_per_month"], team["models"]) == (None, None)
    assert team["limits"]["max_choices"] == 4


def test_team_when_suspended_and_resumed_says_so(capsys):
    run(capsys, "teams", "add", "me")
    run(capsys, "teams", "suspend", "me")
    assert "(suspended)" in run(capsys, "teams", "list")
    run(capsys, "teams", "resume", "me")
    assert "(suspended)" not in run(capsys, "teams", "list")


def test_team_when_it_may_exist_is_left_as_it_is(capsys):
    run(capsys, "teams", "add", "me", "--max-choices", "4")
    run(capsys, "teams", "add", "me", "--exist-ok")
    (team,) = listed(capsys, "teams")
    assert team["limits"]["max_choices"] == 4
    assert raysmith.main(["teams", "add", "me"]) == 2


def test_team_when_another_adds_it_at_this_moment_is_left_as_it_is(
    request: pytest.FixtureRequest,
):
    url = request.getfixturevalue("postgres").new_ledger()
    command = ["teams", "add", "me", "--exist-ok", "--ledger", url]
    codes: list[int] = []
    with Ledger.open(url) as ledger:
        other = threading.Thread(target=lambda: codes.append(raysmith.main(command)))
        with writing(ledger.engine) as connection:
            row = {"name": "me", "is_suspended": False, "created_s": 0}
            connection.execute(insert(teams).values(row))
            other.start()
            other.join(0.5)  # Held up until this is committed.
        other.join()
    assert codes == [0]


def test_usage_when_something_was_used_adds_it_up(capsys):
    run(capsys, "teams", "add", "me")
    now_s = time.time()
    account = Account(hour_of(now_s), month_of(now_s), "me", "key-1", "tiny", "3")
    with Ledger.open() as ledger:
        ledger.apply(Batch("w", 1, (Charge(account, Used(2, 1500, 40, 16)),)))
    (row,) = json.loads(run(capsys, "usage", "--team", "me", "--by", "version", "--json"))["usage"]
    assert row == {
        "version": "3",
        "num_requests": 2,
        "prompt_tokens": 1500,
        "cached_tokens": 16,
        "generated_tokens": 40,
    }
    assert "1,500" in run(capsys, "usage")
    assert "+00:00" in run(capsys, "usage", "--by", "hour", "--json")
    assert json.loads(run(capsys, "usage", "--month", "2020-01", "--json"))["usage"] == []


def test_ledger_when_given_is_used_instead(capsys, tmp_path: Path):
    run(capsys, "teams", "add", "me", "--ledger", "elsewhere/l.db")
    assert listed(capsys, "teams") == []
    assert (tmp_path / "elsewhere" / "l.db").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["teams", "add", "no/slash"], "not allowed"),
        (["teams", "add", "me", "--max-choices", "few"], "--max-choices few: expected"),
        (["teams", "add", "me", "--max-choices", "0"], "max_choices"),
        (["teams", "add", "me", "--tokens-per-month", "-1"], "tokens_per_month"),
        (["teams", "add", "me", "--tokens-per-month", str(2**63)], "tokens_per_month"),
        (["teams", "add", "me", "--max-choices", str(2**63)], f"or equal to {2**63 - 1}"),
        (["keys", "new", "you", "--tokens-per-min", str(2**63)], f"or equal to {2**63 - 1}"),
        (["teams", "set", "you"], "no team `you`"),
        (["keys", "new", "you"], "raysmith teams add you"),
        (["keys", "new", "you", "--scope", "root"], "root"),
        (["keys", "new", "you", "--expires-in-days", "0"], "--expires-in-days 0"),
        (["keys", "revoke", "key-0"], "no key `key-0`"),
        (["keys", "rotate", "key-0", "--overlap-hours", "inf"], "--overlap-hours inf: expected"),
        (["keys", "rotate", "key-0", "--overlap-hours", "nan"], "--overlap-hours nan: expected"),
        (["keys", "rotate", "key-0", "--overlap-hours", "-1"], "--overlap-hours -1: expected"),
        (["usage", "--by", "colour"], "colour"),
        (["usage", "--month", "June"], "`June` is not a month"),
        (["usage", "--month", "9999-12"], "`9999-12` is not a month"),
        (["usage", "--team", "you"], "no team `you`"),
        (["teams", "list", "--ledger", "mysql://h/x"], "postgresql://HOST/NAME"),
    ],
)
def test_command_when_input_is_wrong_exits_with_2_and_says_why(
    arguments: list[str], expected: str, capsys
):
    assert raysmith.main(arguments) == 2
    shown = capsys.readouterr()
    assert expected in shown.err
    assert "Traceback" not in shown.err
