"""The command `raysmith usage`: requests and tokens of a month, by whoever made them.

Takes words; prints the ledger.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.accounting import UsageRow, month_of
from cluster.bookkeeping import GROUPS
from cluster.ledger import Ledger
from jobs.entry import guard, print_json
from raysmith_accounts.options import Json, LedgerOption


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
