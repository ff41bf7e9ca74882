"""The commands `raysmith teams`, `keys` and `usage`: who may use the gateway, and what they used.

Takes words; changes and prints the ledger. What they change holds from a gateway's next request on,
also while it runs.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.accounting import Key, Limits, Scope, Team, UsageRow, month_of
from cluster.bookkeeping import GROUPS
from cluster.config import parse_config
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from jobs.entry import guard, print_json

teams_app = typer.Typer(help="Teams of the gateway: limits, budgets, models.")
keys_app = typer.Typer(help="API keys of the gateway.")

LedgerOption = Annotated[
    str | None,
    typer.Option("--ledger", help="Path or postgresql:// URL; unset: RAYSMITH_LEDGER, else yours."),
]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
RequestLimit = Annotated[
    str | None, typer.Option("--requests-per-min", help="Requests in any 60 s, or `none`.")
]
TokenLimit = Annotated[
    str | None, typer.Option("--tokens-per-min", help="Tokens in any 60 s, or `none`.")
]
ChoiceLimit = Annotated[
    str | None, typer.Option("--max-choices", help="Sequences generated at a time, or `none`.")
]
Budget = Annotated[
    str | None, typer.Option("--tokens-per-month", help="Tokens in a month (UTC), or `none`.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="A model it may ask (repeatable), or `all`."),
]
TeamName = Annotated[str, typer.Argument(metavar="TEAM", help="Name of the team.")]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="Id of the key, as listed.")]


# --- teams -------------------------------------------------------------------------------------


@teams_app.command("add")
def add_team(
    name: TeamName,
    tokens_per_month: Budget = None,
    models: Models = None,
    requests_per_min: RequestLimit = None,
    tokens_per_min: TokenLimit = None,
    max_choices: ChoiceLimit = None,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Leave a team of this name as it is.")
    ] = False,
    ledger: LedgerOption = None,
) -> int:
    """Add a team."""

    def action() -> None:
        changes = _team_changes(tokens_per_month, models)
        limits = _limits(Limits(), requests_per_min, tokens_per_min, max_choices)
        values = {"name": name, "limits": limits, **changes}
        team = parse_config(Team, values, "raysmith teams add")
        with Ledger.open(ledger) as opened:
            if exist_ok and team.name in opened.snapshot().teams:
                _say(f"team `{team.name}` is there already")
            else:
                opened.add_team(team)
                _say(f"added team `{team.name}`")

    return guard(action)


@teams_app.command("set")
def set_team(
    name: TeamName,
    tokens_per_month: Budget = None,
    models: Models = None,
    requests_per_min: RequestLimit = None,
    tokens_per_min: TokenLimit = None,
    max_choices: ChoiceLimit = None,
    ledger: LedgerOption = None,
) -> int:
    """Change a team; what is not named stays."""

    def action() -> None:
        changes = _team_changes(tokens_per_month, models)

        def change(team: Team) -> Team:
            limits = _limits(team.limits, requests_per_min, tokens_per_min, max_choices)
            values = {**team.model_dump(), "limits": limits, **changes}
            return parse_config(Team, values, "raysmith teams set")

        _change_team(ledger, name, change, "changed")

    return guard(action)


@teams_app.command("suspend")
def suspend_team(name: TeamName, ledger: LedgerOption = None) -> int:
    """Refuse all keys of a team from now on."""
    return guard(
        lambda: _change_team(ledger, name, lambda t: t.replace(is_suspended=True), "suspended")
    )


@teams_app.command("resume")
def resume_team(name: TeamName, ledger: LedgerOption = None) -> int:
    """Let a suspended team's keys in again."""
    return guard(
        lambda: _change_team(ledger, name, lambda t: t.replace(is_suspended=False), "resumed")
    )


@teams_app.command("list")
def list_teams(ledger: LedgerOption = None, json: Json = False) -> int:
    """List every team with its limits and what is left of its budget."""

    def action() -> None:
        month = month_of(time.time())
        with Ledger.open(ledger) as opened:
            documents = [
                {**team.model_dump(mode="json"), "remaining": opened.balance(team, month).remaining}
                for team in opened.teams()
            ]
        if json:
            print_json({"teams": documents})
            return
        table = Table("team", "budget a month", "left", "limits", "models", title="teams")
        for document in documents:
            name = document["name"] + (" (suspended)" if document["is_suspended"] else "")
            models = ", ".join(sorted(document["models"] or ())) or "all"
            budget, left = _count(document["tokens_per_month"]), _count(document["remaining"])
            table.add_row(name, budget, left, _limits_text(document["limits"]), models)
        Console().print(table)

    return guard(action)


# --- keys --------------------------------------------------------------------------------------


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
            "limits": _limits(Limits(), requests_per_min, tokens_per_min, max_choices),
            "expires_s": _end_s(expires_in_days),
        }
        with Ledger.open(ledger) as opened:
            _show_key(*opened.new_key(parse_config(Key, values, "raysmith keys new")))

    return guard(action)


@keys_app.command("rotate")
def rotate_key(
    key_id: KeyId,
    overlap_hours: Annotated[
        float, typer.Option(min=0, help="How long the old key works beside the new one.")
    ] = 24.0,
    ledger: LedgerOption = None,
) -> int:
    """Make another key like this one, which ends after a while."""

    def action() -> None:
        with Ledger.open(ledger) as opened:
            _show_key(*opened.rotate_key(key_id, overlap_s=round(3600 * overlap_hours)))
        _say(f"the old key `{key_id}` ends in {overlap_hours:g} hours")

    return guard(action)


@keys_app.command("revoke")
def revoke_key(key_id: KeyId, ledger: LedgerOption = None) -> int:
    """Refuse a key from now on."""

    def action() -> None:
        with Ledger.open(ledger) as opened:
            key = opened.revoke_key(key_id)
        _say(f"revoked key `{key.id}` of team `{key.team}`")

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
            scopes = ", ".join(sorted(key.scopes))
            table.add_row(key.id, key.team, key.label, scopes, _when(key.created_s), _state(key))
        Console().print(table)

    return guard(action)


# --- usage -------------------------------------------------------------------------------------


def show_usage(
    team: Annotated[str | None, typer.Option(help="Only this team.")] = None,
    month: Annotated[str | None, typer.Option(help="Month like 2026-11; unset: this one.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="hour, team, key_id, model, version (repeatable); unset: team, model."),
    ] = None,
    ledger: LedgerOption = None,
    json: Json = False,
) -> int:
    """Show the requests and tokens of a month (UTC)."""

    def action() -> None:
        groups = tuple(by) if by else ("team", "model")
        asked = month or month_of(time.time())
        with Ledger.open(ledger) as opened:
            if team is not None:
                opened.team(team)
            rows = opened.usage(month=asked, by=groups, team=team)
        documents = [_usage_document(row, groups) for row in rows]
        if json:
            print_json({"month": asked, "usage": documents})
        else:
            _print_usage(asked, groups, documents)

    return guard(action)


def _usage_document(row: UsageRow, groups: Sequence[str]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        name: getattr(row, name) for name in GROUPS if name in groups and name != "hour"
    }
    if row.hour_s is not None:
        shown = {"hour": datetime.fromtimestamp(row.hour_s, UTC).isoformat(), **shown}
    return {
        **shown,
        "num_requests": row.used.num_requests,
        "prompt_tokens": row.used.prompt_tokens,
        "cached_tokens": row.used.cached_tokens,
        "generated_tokens": row.used.generated_tokens,
    }


def _print_usage(month: str, groups: Sequence[str], documents: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in GROUPS if name in groups]
    table = Table(*names, "requests", "prompt", "cached", "generated", title=f"usage in {month}")
    for document in documents:
        counts = [value for name, value in document.items() if name not in names]
        table.add_row(*(str(document[name]) for name in names), *(f"{n:,}" for n in counts))
    Console().print(table)


# --- shared ------------------------------------------------------------------------------------


def _change_team(ledger: str | None, name: str, change: Any, done: str) -> None:
    with Ledger.open(ledger) as opened:
        opened.change_team(name, change)
    _say(f"{done} team `{name}`")


def _team_changes(tokens_per_month: str | None, models: list[str] | None) -> dict[str, Any]:
    """Return the fields that were given."""
    changes: dict[str, Any] = {}
    if tokens_per_month is not None:
        changes["tokens_per_month"] = _bound("--tokens-per-month", tokens_per_month)
    if models:
        changes["models"] = None if models == ["all"] else frozenset(models)
    return changes


def _limits(old: Limits, requests: str | None, tokens: str | None, choices: str | None) -> Limits:
    """Return limits with what was given in place of the old."""
    given = {"requests_per_min": requests, "tokens_per_min": tokens, "max_choices": choices}
    changes = {
        name: _bound(f"--{name.replace('_', '-')}", text)
        for name, text in given.items()
        if text is not None
    }
    return parse_config(Limits, {**old.model_dump(), **changes}, "limits")


def _bound(option: str, text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected a whole number or `none`.") from None


def _end_s(days: float | None) -> int | None:
    if days is None:
        return None
    if not 0 < days < 36500:
        raise ConfigError(f"--expires-in-days {days:g}: expected days between 0 and 36500.")
    return round(time.time() + 24 * 3600 * days)


def _show_key(key: Key, secret: str) -> None:
    """Print a key to standard output, and what is known of it elsewhere."""
    ends = "" if key.expires_s is None else f", ends {_when(key.expires_s)}"
    _say(f"key `{key.id}` of team `{key.team}`{ends}; it is shown this once")
    sys.stdout.write(f"{secret}\n")


def _state(key: Key) -> str:
    if key.revoked_s is not None:
        return f"revoked {_when(key.revoked_s)}"
    if key.expires_s is None:
        return "valid"
    return f"{'valid until' if key.is_valid(time.time()) else 'expired'} {_when(key.expires_s)}"


def _limits_text(limits: Mapping[str, int | None]) -> str:
    shown = [f"{value:,} {name.replace('_', ' ')}" for name, value in limits.items() if value]
    return ", ".join(shown) or "none"


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


def _when(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
