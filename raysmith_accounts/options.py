"""What the commands share: options of the ledger and of limits, how they are read and shown.

Takes words of a command line; gives values, or says what was expected. It does not open the ledger.
"""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console

from cluster.accounting import Limits
from cluster.config import parse_config
from cluster.errors import ConfigError

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
TeamName = Annotated[str, typer.Argument(metavar="TEAM", help="Name of the team.")]


def limits_from(
    old: Limits, requests: str | None, tokens: str | None, choices: str | None
) -> Limits:
    """Return limits with what was given in place of the old."""
    given = {"requests_per_min": requests, "tokens_per_min": tokens, "max_choices": choices}
    changes = {
        name: bound(f"--{name.replace('_', '-')}", text)
        for name, text in given.items()
        if text is not None
    }
    return parse_config(Limits, {**old.model_dump(), **changes}, "limits")


def bound(option: str, text: str) -> int | None:
    """Return the number of an option, None for `none`. Raises ConfigError."""
    if text == "none":
        return None
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected a whole number or `none`.") from None


def when(time_s: int) -> str:
    """Return a time as people read it."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def say(text: str) -> None:
    """Print a line to standard error, as it is."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
