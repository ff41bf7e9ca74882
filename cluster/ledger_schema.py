"""The ledger's tables.

Gives SQLAlchemy's description of them. It does not know what the rows mean, nor how a database is
opened.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

SCHEMA_VERSION = 1

metadata = MetaData()

# One row. `revision` grows with every change of teams and keys, so that readers notice it.
state = Table(
    "ledger",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("pepper_check", String(64)),  # null until the first pepper is made
)
teams = Table(
    "teams",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("requests_per_min", BigInteger),
    Column("tokens_per_min", BigInteger),
    Column("max_choices", BigInteger),
    Column("tokens_per_month", BigInteger),
    Column("models", Text),  # a JSON list
    Column("is_suspended", Boolean, nullable=False),
    Column("created_s", BigInteger, nullable=False),
)
keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("team", ForeignKey("teams.name"), nullable=False, index=True),
    Column("label", String(128), nullable=False),
    Column("scopes", Text, nullable=False),  # a JSON list
    Column("requests_per_min", BigInteger),
    Column("tokens_per_min", BigInteger),
    Column("max_choices", BigInteger),
    Column("created_s", BigInteger, nullable=False),
    Column("expires_s", BigInteger),
    Column("revoked_s", BigInteger),
)
# When a rotated key was to end before that; null: never.
rotations = Table(
    "rotations",
    metadata,
    Column("key_id", ForeignKey("keys.id"), primary_key=True),
    Column("expires_s", BigInteger),
)
usage = Table(
    "usage",
    metadata,
    Column("hour", BigInteger, primary_key=True),
    Column("team", String(128), primary_key=True),
    Column("key_id", String(32), primary_key=True),
    Column("model", String(128), primary_key=True),
    Column("version", String(128), primary_key=True),
    Column("num_requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
)
spending = Table(
    "spending",
    metadata,
    Column("team", String(128), primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)
leases = Table(
    "leases",
    metadata,
    Column("writer", String(64), primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("team", String(128), primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
)
# The last batch of each writer and its answer: a repeated batch is answered, not applied.
writers = Table(
    "writers",
    metadata,
    Column("writer", String(64), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("answer", Text, nullable=False),
    Column("seen_s", BigInteger, nullable=False, index=True),
)
