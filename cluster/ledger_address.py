"""Where a ledger is: an SQLite file or a PostgreSQL server.

Takes a path or URL, or what the environment says; gives a URL. It opens nothing.
"""

import os

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from cluster.errors import ConfigError
from cluster.storage import resolve_output, state_folder

LEDGER_VARIABLE = "RAYSMITH_LEDGER"


def ledger_url(given: str | None = None) -> URL:
    """Return the URL of a ledger given as a path or URL, unset: where the environment says.

    That is RAYSMITH_LEDGER, else `ledger.db` in the folder of this user's state. Raises ConfigError
    for what is neither SQLite nor PostgreSQL.
    """
    given = given or os.environ.get(LEDGER_VARIABLE) or str(state_folder() / "ledger.db")
    if "://" not in given:
        return URL.create("sqlite", database=str(resolve_output(given)))
    try:
        url = make_url(given)
    except ArgumentError:
        raise ConfigError(
            "the ledger's URL cannot be read. Write postgresql://HOST/NAME."
        ) from None
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database:
        return url.set(database=str(resolve_output(url.database)))
    if backend in {"postgresql", "postgres"}:
        return url.set(drivername="postgresql+psycopg")
    raise ConfigError(
        f"the ledger `{url.render_as_string()}` is neither a path, sqlite:///PATH nor "
        "postgresql://HOST/NAME. Give one of these."
    )


def public_url(given: str | None = None) -> str | None:
    """Return how a configuration that others may read names a ledger; None: as the environment.

    A path is made absolute, since whoever reads it may run in another folder. Raises ConfigError if
    a URL with a password is given.
    """
    url = ledger_url(given)
    if is_file(url):
        return url.database
    if not given:
        return None
    if url.password is not None:
        raise ConfigError(
            "the ledger's URL has a password, which a deployed configuration would show. Put it in "
            f"~/.pgpass, or set {LEDGER_VARIABLE} where the cluster is started and give no ledger."
        )
    return url.render_as_string()


def is_file(url: URL) -> bool:
    """Return whether the ledger is an SQLite file, which only processes of its machine share."""
    return url.get_backend_name() == "sqlite"
