"""The ledger: teams, their keys, limits and budgets, and what they used.

Takes changes that an administrator asks for; gives what is recorded. What gateways use is written
by `cluster.bookkeeping` for the steward. It does not know HTTP, Ray or who runs the command.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from sqlalchemy import Connection, Engine, Row, insert, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from cluster import ledger_schema as schema
from cluster.accounting import Answer, Balance, Batch, Key, Limits, Scope, Team, UsageRow
from cluster.bookkeeping import apply_batch, read_balance, read_usage
from cluster.errors import AccountError, LedgerError
from cluster.ledger_address import is_file, ledger_url
from cluster.ledger_database import LedgerFile, open_engine, reading, writing
from cluster.pepper import Pepper, create_pepper, load_pepper, make_key, pepper_path

_LIMITS = tuple(Limits.model_fields)


@dataclass(frozen=True)
class Snapshot:
    """All teams and keys at one revision; `by_digest` has what is kept of each key."""

    revision: int
    teams: Mapping[str, Team]
    keys: Mapping[str, Key]
    by_digest: Mapping[str, Key]


class Rotated(NamedTuple):
    """A key with its new end, and the one that follows it with its secret."""

    old: Key
    new: Key
    secret: str


class Ledger:
    """An open ledger; used by any thread, since each call has a connection of its own."""

    def __init__(self, engine: Engine, pepper: Pepper, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._file = LedgerFile(Path(engine.url.database or "")) if is_file(engine.url) else None
        self._pepper = pepper
        self._clock = clock

    @classmethod
    def open(cls, given: str | None = None, *, clock: Callable[[], float] = time.time) -> Self:
        """Open the ledger at a path or URL (unset: where the environment says), or make it.

        Raises ConfigError if its pepper is lost or open to others, LedgerError if it cannot be
        opened, is newer than this program, or its keys were made with another pepper.
        """
        url = ledger_url(given)
        engine = open_engine(url)
        try:
            return cls(engine, _pepper_of(engine, url), clock)
        except BaseException:
            engine.dispose()
            raise

    @property
    def engine(self) -> Engine:
        """The database, for those that keep a connection of their own."""
        return self._engine

    @property
    def file(self) -> LedgerFile | None:
        """The file it is in, or None for one on a server."""
        return self._file

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- teams ---------------------------------------------------------------------------------

    def add_team(self, team: Team) -> Team:
        """Add a team. Raises AccountError if there is one of this name."""
        team = team.replace(created_s=int(self._clock()))
        try:
            with writing(self._engine) as connection:
                connection.execute(insert(schema.teams).values(_team_row(team)))
                _bump(connection)
        except LedgerError as error:
            if not isinstance(error.__cause__, IntegrityError):
                raise
            raise AccountError(
                f"there is a team `{team.name}` already. Change it with `raysmith teams set`."
            ) from None
        return team

    def change_team(self, name: str, change: Callable[[Team], Team]) -> Team:
        """Replace a team by what `change` makes of it. Raises AccountError if there is none."""
        with writing(self._engine) as connection:
            old = self._team(connection, name, is_locked=True)
            new = change(old)
            assert new.name == old.name, "a team keeps its name: keys and usage refer to it"
            rows = update(schema.teams).where(schema.teams.c.name == name)
            connection.execute(rows.values(_team_row(new)))
            _bump(connection)
        return new

    def team(self, name: str) -> Team:
        """Return one team. Raises AccountError that lists those there are."""
        with reading(self._engine) as connection:
            return self._team(connection, name)

    def teams(self) -> list[Team]:
        """Return every team, by name."""
        return list(self.snapshot().teams.values())

    # --- keys ----------------------------------------------------------------------------------

    def new_key(self, key: Key) -> tuple[Key, str]:
        """Add a key, whose id is made here, and return it with the secret, which is kept nowhere.

        Raises AccountError if there is no such team.
        """
        with writing(self._engine) as connection:
            self._team(connection, key.team, is_locked=True)
            return self._insert_key(connection, key)

    def rotate_key(self, key_id: str, *, overlap_s: int) -> Rotated:
        """Make another key like this one, which ends after `overlap_s` if it does not sooner.

        The new one lives as long as the old one was to before any rotation. Raises AccountError if
        there is no such key, or it is not valid any more.
        """
        now_s = int(self._clock())
        with writing(self._engine) as connection:
            old = self._key(connection, key_id)
            if not old.is_valid(now_s):
                raise AccountError(
                    f"the key `{key_id}` is revoked or expired. Make another: `raysmith keys new "
                    f"{old.team}`."
                )
            end_s, next_end_s = now_s + overlap_s, None
            if old.expires_s is not None:
                end_s = min(end_s, old.expires_s)
            first_end_s = _first_end(connection, old)
            if first_end_s is not None:
                next_end_s = now_s + first_end_s - old.created_s
            rows = update(schema.keys).where(schema.keys.c.id == key_id)
            connection.execute(rows.values(expires_s=end_s))
            new, secret = self._insert_key(connection, old.replace(expires_s=next_end_s))
            return Rotated(old.replace(expires_s=end_s), new, secret)

    def revoke_key(self, key_id: str) -> Key:
        """End a key at once. Raises AccountError if there is none."""
        with writing(self._engine) as connection:
            key = self._key(connection, key_id)
            if key.revoked_s is None:
                key = key.replace(revoked_s=int(self._clock()))
                rows = update(schema.keys).where(schema.keys.c.id == key_id)
                connection.execute(rows.values(revoked_s=key.revoked_s))
                _bump(connection)
        return key

    def keys(self, team: str | None = None) -> list[Key]:
        """Return every key, or those of a team, the oldest first."""
        if team is not None:
            self.team(team)
        return [key for key in self.snapshot().keys.values() if team in {None, key.team}]

    # --- what readers need ---------------------------------------------------------------------

    def digest(self, secret: str) -> str:
        """Return what is kept of a key, to look it up in a snapshot."""
        return self._pepper.digest(secret)

    def snapshot(self) -> Snapshot:
        """Return all teams and keys as they are now."""
        with reading(self._engine) as connection:
            revision = connection.execute(select(schema.state.c.revision)).scalar_one()
            teams = connection.execute(select(schema.teams).order_by(schema.teams.c.name)).all()
            order = (schema.keys.c.created_s, schema.keys.c.id)
            rows = connection.execute(select(schema.keys).order_by(*order)).all()
        keys = {row.id: _key_of(row) for row in rows}
        return Snapshot(
            revision,
            {row.name: _team_of(row) for row in teams},
            keys,
            {row.digest: keys[row.id] for row in rows},
        )

    def apply(self, batch: Batch) -> Answer:
        """Write what a gateway used and lease what it asks for; see `bookkeeping.apply_batch`.

        Raises LedgerError, and writes nothing, if another file has taken the ledger's place.
        """
        if self._file is not None:
            self._file.check()
        with writing(self._engine) as connection:
            return apply_batch(connection, batch, int(self._clock()))

    def balance(self, team: Team, month: str) -> Balance:
        """Return what is left of a team's budget."""
        with reading(self._engine) as connection:
            return read_balance(connection, team.name, team.tokens_per_month, month)

    def usage(self, *, month: str, by: Sequence[str], team: str | None = None) -> list[UsageRow]:
        """Return a month's use added up by some of hour, team, key_id, model, version."""
        with reading(self._engine) as connection:
            return read_usage(connection, month=month, by=by, team=team)

    # --- inside a transaction ------------------------------------------------------------------

    def _team(self, connection: Connection, name: str, *, is_locked: bool = False) -> Team:
        """Return a team; locked, so that no other transaction changes it before this one ends.

        SQLite knows no such locks and needs none: there `writing` locks the whole ledger.
        """
        query = select(schema.teams).where(schema.teams.c.name == name)
        if is_locked:
            query = query.with_for_update()
        row = connection.execute(query).one_or_none()
        if row is not None:
            return _team_of(row)
        names = connection.execute(select(schema.teams.c.name).order_by("name")).scalars().all()
        known = ", ".join(f"`{known}`" for known in names) or "none"
        raise AccountError(
            f"there is no team `{name}` (there is: {known}). Add it: `raysmith teams add {name}`."
        )

    def _key(self, connection: Connection, key_id: str) -> Key:
        """Return a key, locked as `_team` does."""
        query = select(schema.keys).where(schema.keys.c.id == key_id)
        row = connection.execute(query.with_for_update()).one_or_none()
        if row is None:
            raise AccountError(f"there is no key `{key_id}`. See `raysmith keys list`.")
        return _key_of(row)

    def _insert_key(self, connection: Connection, like: Key) -> tuple[Key, str]:
        secret = make_key()
        key = like.replace(id=f"key-{secrets.token_hex(6)}", created_s=int(self._clock()))
        row = {
            **key.model_dump(exclude={"limits", "scopes"}),
            **_columns(key.limits),
            "scopes": json.dumps(sorted(key.scopes)),
            "digest": self.digest(secret),
        }
        connection.execute(insert(schema.keys).values(row))
        _bump(connection)
        return key, secret


def _pepper_of(engine: Engine, url: URL) -> Pepper:
    """Return the pepper of a ledger, made together with a new one."""
    pepper = load_pepper(url)
    with writing(engine) as connection:
        query = select(schema.state.c.pepper_check).with_for_update()
        expected = connection.execute(query).scalar_one()
        if expected is None:
            pepper = pepper or create_pepper(url)
            connection.execute(update(schema.state).values(pepper_check=pepper.check()))
            return pepper
    if pepper is None:
        pepper = load_pepper(url)  # another process has just made it
    if pepper is None:
        raise LedgerError(
            f"{pepper_path(url)} is missing, and no key can be checked without it. Restore it, or "
            "set RAYSMITH_PEPPER to what it was."
        )
    if pepper.check() != expected:
        raise LedgerError(
            f"the keys of the ledger {url.database} were made with another pepper than "
            f"RAYSMITH_PEPPER or {pepper_path(url)}. Restore what it was."
        )
    return pepper


def _first_end(connection: Connection, key: Key) -> int | None:
    """Return when a key was to end before it was rotated, and remember it at the first time."""
    query = select(schema.rotations).where(schema.rotations.c.key_id == key.id)
    row = connection.execute(query).one_or_none()
    if row is not None:
        end_s: int | None = row.expires_s
        return end_s
    first = {"key_id": key.id, "expires_s": key.expires_s}
    connection.execute(insert(schema.rotations).values(first))
    return key.expires_s


def _bump(connection: Connection) -> None:
    connection.execute(update(schema.state).values(revision=schema.state.c.revision + 1))


def _columns(limits: Limits) -> dict[str, int | None]:
    return limits.model_dump()


def _limits_of(row: Row[Any]) -> Limits:
    return Limits(**{name: getattr(row, name) for name in _LIMITS})


def _team_row(team: Team) -> dict[str, Any]:
    models = None if team.models is None else json.dumps(sorted(team.models))
    values = team.model_dump(exclude={"limits", "models"})
    return {**values, **_columns(team.limits), "models": models}


def _team_of(row: Row[Any]) -> Team:
    return Team(
        name=row.name,
        limits=_limits_of(row),
        tokens_per_month=row.tokens_per_month,
        models=None if row.models is None else frozenset(json.loads(row.models)),
        is_suspended=row.is_suspended,
        created_s=row.created_s,
    )


def _key_of(row: Row[Any]) -> Key:
    return Key(
        id=row.id,
        team=row.team,
        label=row.label,
        scopes=frozenset(Scope(scope) for scope in json.loads(row.scopes)),
        limits=_limits_of(row),
        created_s=row.created_s,
        expires_s=row.expires_s,
        revoked_s=row.revoked_s,
    )
