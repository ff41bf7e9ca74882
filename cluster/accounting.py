"""Teams, keys, limits and what they used: the values that the ledger keeps, and its arithmetic.

Takes numbers and times; gives values and decisions. It does not know where they are kept, nor HTTP.
A month and an hour are those of UTC; times are whole seconds since the epoch.

A budget is spent in two steps, so that it is never overspent. A writer (a gateway) first takes a
*lease* of tokens for a team and a month, which counts against the budget at once. Requests are paid
out of the lease without asking anyone. Afterwards one *batch* says what was spent (*charges*) and
by how much leases are smaller for it (*returns*). Batches are numbered by their writer, so that a
repeated one is known.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from pydantic import Field, field_validator

from cluster.config import StrictModel
from cluster.errors import ConfigError
from cluster.storage import check_name

HOUR_S = 3600
MAX_COUNT = 2**63 - 1  # What a column of the ledger holds.
# A writer that was silent for so long has died: what it leased is free again.
WRITER_TTL_S = 300
# Asks to compare a version's answers: charged like any other, and no part of its outcomes.
ROLLOUT_TEAM = "raysmith-rollout"


class Scope(StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    METRICS = "metrics"
    ADMIN = "admin"


class Limits(StrictModel):
    """Bounds of a team or of one key; unset: none."""

    requests_per_min: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="Requests in any 60 s."
    )
    tokens_per_min: int | None = Field(None, ge=1, le=MAX_COUNT, description="Tokens in any 60 s.")
    max_choices: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="Sequences generated at a time."
    )


class Team(StrictModel):
    """Whoever pays: a group of people or a service."""

    name: str = Field(description="Name of the team.")
    limits: Limits = Field(Limits(), description="Bounds of all its keys together.")
    tokens_per_month: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="Budget of prompt and generated tokens a month; unset: none.",
    )
    models: frozenset[str] | None = Field(None, description="Models it may ask; unset: all.")
    is_suspended: bool = Field(False, description="Whether its keys are refused.")
    created_s: int = Field(0, description="When it was added.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return check_name(value, "team")

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: frozenset[str] | None) -> frozenset[str] | None:
        if value is not None and not value:
            raise ValueError("names no model; suspend the team instead")
        return None if value is None else frozenset(check_name(name, "model") for name in value)


class Key(StrictModel):
    """What is known of an API key; the key itself is kept nowhere."""

    id: str = Field(description="Name of the key, which is no secret.")
    team: str = Field(description="Team it belongs to.")
    label: str = Field("", max_length=128, description="What it is for.")
    scopes: frozenset[Scope] = Field(min_length=1, description="What it may do.")
    limits: Limits = Field(Limits(), description="Bounds of this key alone.")
    created_s: int = Field(0, description="When it was made.")
    expires_s: int | None = Field(None, description="When it ends; unset: never.")
    revoked_s: int | None = Field(None, description="When it was revoked.")

    def is_valid(self, now_s: float) -> bool:
        """Return whether it is neither revoked nor expired."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)


@dataclass(frozen=True)
class Account:
    """Who used what: usage is added up for each of these."""

    hour: int
    month: str
    team: str
    key_id: str
    model: str
    version: str


@dataclass(frozen=True)
class Used:
    """Requests and their tokens."""

    num_requests: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int

    @property
    def tokens(self) -> int:
        """What counts against a budget: cached tokens are prompt tokens like others."""
        return self.prompt_tokens + self.generated_tokens

    def __add__(self, other: "Used") -> "Used":
        return Used(
            self.num_requests + other.num_requests,
            self.prompt_tokens + other.prompt_tokens,
            self.generated_tokens + other.generated_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True)
class Charge:
    """What an account used since its last charge."""

    account: Account
    used: Used


@dataclass(frozen=True)
class Lease:
    """A wish for tokens of a team's budget: `needed` by requests that wait, at best `wanted`.

    Its epoch tells leases of a writer apart that it took before and after it was taken for dead.
    """

    team: str
    month: str
    epoch: int
    needed: int
    wanted: int


@dataclass(frozen=True)
class Return:
    """Leased tokens that were spent, or are not needed any more."""

    team: str
    month: str
    epoch: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """What a writer says at once. Its sequence grows by one with each new batch."""

    writer: str
    sequence: int
    charges: tuple[Charge, ...] = ()
    returns: tuple[Return, ...] = ()
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Tokens granted to each lease of a batch, in its order."""

    granted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Balance:
    """A team's budget in a month; `budget` None: it has none."""

    budget: int | None
    spent: int
    leased: int

    @property
    def remaining(self) -> int | None:
        """Tokens that nobody spent or leased, or None without a budget."""
        return None if self.budget is None else max(0, self.budget - self.spent - self.leased)


@dataclass(frozen=True)
class UsageRow:
    """What an account used, added up; fields that were not asked for are empty."""

    hour_s: int | None
    team: str | None
    key_id: str | None
    model: str | None
    version: str | None
    used: Used


def grant(remaining: int | None, lease: Lease) -> int:
    """Return how many tokens a lease gets of those that remain.

    Near the end of a budget a writer gets little more than it needs, so that what is left is not
    locked up by one of several.
    """
    if remaining is None:
        return lease.wanted
    share = min(lease.wanted, remaining // 4)
    return min(remaining, max(lease.needed, share))


def month_of(now_s: float) -> str:
    """Return the month of a time, as `2026-11`."""
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m")


def hour_of(now_s: float) -> int:
    """Return the hour of a time, counted from the epoch."""
    return int(now_s // HOUR_S)


def month_hours(month: str) -> tuple[int, int]:
    """Return a month's first hour and the first one after it. Raises ConfigError if it has none."""
    try:
        first = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
        end = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    except ValueError:  # also for the last month that a date can have
        message = f"`{month}` is not a month that usage can be of. Write one like 2026-11."
        raise ConfigError(message) from None
    return hour_of(first.timestamp()), hour_of(end.timestamp())
