"""The commands `raysmith keys`: made, shown once, rotated and revoked.

Takes words; changes and prints the ledger, which keeps digests of keys alone.
"""

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.accounting import Key, Limits, Scope
from cluster.config import parse_config
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from jobs.entry import guard, print_json
from raysmith_accounts.options import (
    ChoiceLimit,
    Json,
    LedgerOption,
    RequestLimit,
    TeamName,
    TokenLimit,
    limits_from,
    say,
    when,
)

keys_app = typer.Typer(help="API keys of the gateway.")

_MOST_DAYS = 36_500
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="Id of the key, as listed.")]


@keys_app.command("new")
def new_key(
    team: TeamName,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    scopes: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="What it may do (repeatable); unset: inference."),
    ] = None,
    expires_in_days: Annotated[
        float | None, typer.Option(help="Days until it ends; unset: never.")
    ] = None,
    requests_per_min: RequestLimit = None,
    tokens_per_min: TokenLimit = None,
    max_choices: ChoiceLimit = None,
    ledger: LedgerOption = None,
) -> int:
    """Make an API key; it is shown once, only its digest is kept."""

    def action() -> None:
        values = {
            "id": "",
            "team": team,
            "label": label,
            "scopes": frozenset(scopes or [Scope.INFERENCE]),
            "limits": limits_from(Limits(), requests_per_min, tokens_per_min, max_choices),
            "expires_s": _end_s(expires_in_days),
        }
        with Ledger.open(ledger) as opened:
            _show_key(*opened.new_key(parse_config(Key, values, "raysmith keys new")))

    return guard(action)


@keys_app.command("rotate")
def rotate_key(
    key_id: KeyId,
    overlap_hours: Annotated[
        float, typer.Option(help="How long the old key works beside the new one.")
    ] = 24.0,
    ledger: LedgerOption = None,
) -> int:
    """Make another key like this one, which ends after a while."""

    def action() -> None:
        overlap_s = _overlap_s(overlap_hours)
        with Ledger.open(ledger) as opened:
            old, new, secret = opened.rotate_key(key_id, overlap_s=overlap_s)
        _show_key(new, secret)
        assert old.expires_s is not None, "a rotated key ends"
        say(f"the old key `{key_id}` ends {when(old.expires_s)}")

    return guard(action)


@keys_app.command("revoke")
def revoke_key(key_id: KeyId, ledger: LedgerOption = None) -> int:
    """Refuse a key from now on."""

    def action() -> None:
        with Ledger.open(ledger) as opened:
            key = opened.revoke_key(key_id)
        say(f"revoked key `{key.id}` of team `{key.team}`")

    return guard(action)


@keys_app.command("list")
def list_keys(
    team: Annotated[str | None, typer.Option(help="Only those of this team.")] = None,
    ledger: LedgerOption = None,
    json: Json = False,
) -> int:
    """List every key; the keys themselves are kept nowhere."""

    def action() -> None:
        with Ledger.open(ledger) as opened:
            keys = opened.keys(team)
        if json:
            print_json({"keys": [key.model_dump(mode="json") for key in keys]})
            return
        table = Table("key", "team", "label", "scopes", "made", "state", title="keys")
        table.columns[0].no_wrap = True  # it is typed again, for `rotate` and `revoke`
        for key in keys:
            scopes, made = ", ".join(sorted(key.scopes)), when(key.created_s)
            label = Text(key.label)  # As it is: rich would read `[x]` in it as markup.
            table.add_row(key.id, key.team, label, scopes, made, _state(key))
        Console().print(table)

    return guard(action)


def _end_s(days: float | None) -> int | None:
    if days is None:
        return None
    if not 0 < days < _MOST_DAYS:
        raise ConfigError(f"--expires-in-days {days:g}: expected days between 0 and {_MOST_DAYS}.")
    return round(time.time() + 24 * 3600 * days)


def _overlap_s(hours: float) -> int:
    if not 0 <= hours < 24 * _MOST_DAYS:  # nor what is no number
        most = 24 * _MOST_DAYS
        raise ConfigError(f"--overlap-hours {hours:g}: expected hours between 0 and {most}.")
    return round(3600 * hours)


def _show_key(key: Key, secret: str) -> None:
    """Print a key to standard output, and what is known of it elsewhere."""
    ends = "" if key.expires_s is None else f", ends {when(key.expires_s)}"
    say(f"key `{key.id}` of team `{key.team}`{ends}; it is shown this once")
    sys.stdout.write(f"{secret}\n")


def _state(key: Key) -> str:
    if key.revoked_s is not None:
        return f"revoked {when(key.revoked_s)}"
    if key.expires_s is None:
        return "valid"
    return f"{'valid until' if key.is_valid(time.time()) else 'expired'} {when(key.expires_s)}"
