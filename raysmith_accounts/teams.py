"""The commands `raysmith teams`: limits, budgets and models of those who share the gateway.

Takes words; changes and prints the ledger.
"""

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.accounting import Limits, Team, month_of
from cluster.config import parse_config
from cluster.errors import AccountError
from cluster.ledger import Ledger
from jobs.entry import guard, print_json
from raysmith_accounts.options import (
    ChoiceLimit,
    Json,
    LedgerOption,
    RequestLimit,
    TeamName,
    TokenLimit,
    bound,
    limits_from,
    say,
)

teams_app = typer.Typer(help="Teams of the gateway: limits, budgets, models.")

Budget = Annotated[
    str | None, typer.Option("--tokens-per-month", help="Tokens in a month (UTC), or `none`.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="A model it may ask (repeatable), or `all`."),
]


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
        limits = limits_from(Limits(), requests_per_min, tokens_per_min, max_choices)
        values = {"name": name, "limits": limits, **changes}
        team = parse_config(Team, values, "raysmith teams add")
        with Ledger.open(ledger) as opened:
            try:
                opened.add_team(team)
            except AccountError:
                if not exist_ok:
                    raise
                say(f"team `{team.name}` is there already")
            else:
                say(f"added team `{team.name}`")

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
            limits = limits_from(team.limits, requests_per_min, tokens_per_min, max_choices)
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


def _change_team(ledger: str | None, name: str, change: Callable[[Team], Team], done: str) -> None:
    with Ledger.open(ledger) as opened:
        opened.change_team(name, change)
    say(f"{done} team `{name}`")


def _team_changes(tokens_per_month: str | None, models: list[str] | None) -> dict[str, Any]:
    """Return the fields that were given."""
    changes: dict[str, Any] = {}
    if tokens_per_month is not None:
        changes["tokens_per_month"] = bound("--tokens-per-month", tokens_per_month)
    if models:
        changes["models"] = None if models == ["all"] else frozenset(models)
    return changes


def _limits_text(limits: Mapping[str, int | None]) -> str:
    shown = [f"{value:,} {name.replace('_', ' ')}" for name, value in limits.items() if value]
    return ", ".join(shown) or "none"


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"
