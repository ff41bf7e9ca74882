"""What gateways used, written once: charges, leases, and the sums over them.

Takes a connection inside a transaction; gives answers and sums. It does not begin or commit, and
knows nothing of a team but its budget.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cluster import ledger_schema as schema
from cluster.accounting import (
    HOUR_S,
    WRITER_TTL_S,
    Answer,
    Balance,
    Batch,
    Charge,
    Lease,
    Return,
    UsageRow,
    Used,
    grant,
    month_hours,
)
from cluster.errors import ConfigError

GROUPS = ("hour", "team", "key_id", "model", "version")
_SUMS = ("num_requests", "prompt_tokens", "generated_tokens", "cached_tokens")
_FORGET_WRITER_S = 30 * 24 * HOUR_S


def apply_batch(connection: Connection, batch: Batch, now_s: int) -> Answer:
    """Write a batch and return its answer; a batch that was written before changes nothing.

    A writer sends its next batch after the answer to the last one, so only that may come again. One
    that is older yet was delayed on its way, and nobody waits for its answer.
    """
    query = select(schema.writers).where(schema.writers.c.writer == batch.writer)
    known = connection.execute(query.with_for_update()).one_or_none()
    if known is not None and batch.sequence <= known.sequence:
        is_last = batch.sequence == known.sequence
        return Answer(tuple(json.loads(known.answer))) if is_last else Answer()
    _forget_dead_writers(connection, now_s)
    for charge in sorted(batch.charges, key=lambda charge: repr(charge.account)):
        _write_charge(connection, charge)
    for returned in batch.returns:
        _shrink_lease(connection, batch.writer, returned)
    granted = [_lease(connection, batch.writer, lease) for lease in batch.leases]
    row = {
        "writer": batch.writer,
        "sequence": batch.sequence,
        "answer": json.dumps(granted),
        "seen_s": now_s,
    }
    _upsert(connection, schema.writers, row, replaced=("sequence", "answer", "seen_s"))
    return Answer(tuple(granted))


def read_balance(connection: Connection, team: str, budget: int | None, month: str) -> Balance:
    """Return what was spent and leased, both as of one moment."""
    spent = select(schema.spending.c.tokens).where(
        schema.spending.c.team == team, schema.spending.c.month == month
    )
    leased = select(func.sum(schema.leases.c.tokens)).where(
        schema.leases.c.team == team, schema.leases.c.month == month
    )
    # One statement: between two, a charge could move tokens from one sum to the other.
    query = select(
        func.coalesce(spent.scalar_subquery(), 0), func.coalesce(leased.scalar_subquery(), 0)
    )
    row = connection.execute(query).one()
    return Balance(budget, int(row[0]), int(row[1]))


def read_usage(
    connection: Connection, *, month: str, by: Sequence[str], team: str | None = None
) -> list[UsageRow]:
    """Return the use of a month, added up over everything that `by` does not name.

    Raises ConfigError if `by` names what usage is not kept for, or `month` is none.
    """
    if unknown := [name for name in by if name not in GROUPS]:
        raise ConfigError(f"usage is not kept by `{unknown[0]}`. Choose from: {', '.join(GROUPS)}.")
    first, end = month_hours(month)
    table = schema.usage
    groups = [table.c[name] for name in GROUPS if name in by]
    sums = [func.sum(table.c[name]).label(name) for name in _SUMS]
    query = select(*groups, *sums).where(table.c.hour >= first, table.c.hour < end)
    if team is not None:
        query = query.where(table.c.team == team)
    query = query.group_by(*groups).order_by(*groups)
    rows = connection.execute(query).mappings().all()
    return [_usage_row(row) for row in rows if row["num_requests"] is not None]


def _usage_row(row: RowMapping) -> UsageRow:
    hour = row.get("hour")
    return UsageRow(
        hour_s=None if hour is None else hour * HOUR_S,
        team=row.get("team"),
        key_id=row.get("key_id"),
        model=row.get("model"),
        version=row.get("version"),
        used=Used(*(int(row[name]) for name in _SUMS)),
    )


def _write_charge(connection: Connection, charge: Charge) -> None:
    account, used = charge.account, charge.used
    row = {
        **{name: getattr(account, name) for name in GROUPS},
        **{name: getattr(used, name) for name in _SUMS},
    }
    _upsert(connection, schema.usage, row, added=_SUMS)
    spent = {"team": account.team, "month": account.month, "tokens": used.tokens}
    _upsert(connection, schema.spending, spent, added=("tokens",))


def _lease(connection: Connection, writer: str, lease: Lease) -> int:
    # The lock makes two stewards of one PostgreSQL take turns at a team's budget.
    query = select(schema.teams.c.tokens_per_month).where(schema.teams.c.name == lease.team)
    team = connection.execute(query.with_for_update()).one_or_none()
    if team is None:  # Teams are never removed: this is not the ledger that the writer reads.
        return 0
    budget = team.tokens_per_month
    remaining = read_balance(connection, lease.team, budget, lease.month).remaining
    tokens = grant(remaining, lease)
    if tokens:
        row = {
            "writer": writer,
            "epoch": lease.epoch,
            "team": lease.team,
            "month": lease.month,
            "tokens": tokens,
        }
        _upsert(connection, schema.leases, row, added=("tokens",))
    return tokens


def _shrink_lease(connection: Connection, writer: str, returned: Return) -> None:
    """Lower a lease, not below 0: it is gone if its writer was taken for dead."""
    table = schema.leases
    rows = (
        table.c.writer == writer,
        table.c.epoch == returned.epoch,
        table.c.team == returned.team,
        table.c.month == returned.month,
    )
    connection.execute(update(table).where(*rows).values(tokens=table.c.tokens - returned.tokens))
    connection.execute(delete(table).where(*rows, table.c.tokens <= 0))


def _forget_dead_writers(connection: Connection, now_s: int) -> None:
    """Free what silent writers leased; forget them once no repeat of theirs can come."""
    writers = schema.writers.c
    dead = select(writers.writer).where(writers.seen_s < now_s - WRITER_TTL_S)
    connection.execute(delete(schema.leases).where(schema.leases.c.writer.in_(dead)))
    forgotten = writers.seen_s < now_s - _FORGET_WRITER_S
    connection.execute(delete(schema.writers).where(forgotten))


def _upsert(
    connection: Connection,
    table: Table,
    row: Mapping[str, Any],
    *,
    added: Sequence[str] = (),
    replaced: Sequence[str] = (),
) -> None:
    """Insert a row; where there is one of its key, add to some columns and replace others."""
    is_postgres = connection.dialect.name == "postgresql"
    statement = (postgresql if is_postgres else sqlite).insert(table).values(row)
    excluded = statement.excluded
    changes = {name: table.c[name] + excluded[name] for name in added}
    changes |= {name: excluded[name] for name in replaced}
    upsert = statement.on_conflict_do_update(index_elements=table.primary_key.columns, set_=changes)
    connection.execute(upsert)
