"""The secret that API keys are digested with, and the digests.

Takes the ledger's URL; gives a pepper and digests. Who reads the ledger alone can neither use a
key nor try guesses: the pepper is in a file of its own (mode 0600), or in RAYSMITH_PEPPER.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from sqlalchemy.engine import URL

from cluster.errors import ConfigError
from cluster.ledger_address import is_file
from cluster.session_state import write_private
from cluster.storage import state_folder, storage_errors

PEPPER_VARIABLE = "RAYSMITH_PEPPER"
KEY_PREFIX = "rs-"
_MIN_LENGTH = 32


class Pepper:
    """Digests keys; two peppers of the same secret agree."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def digest(self, key: str) -> str:
        """Return what is kept of a key: HMAC-SHA256 in hexadecimal."""
        return hmac.digest(self._secret, key.encode(), hashlib.sha256).hex()

    def check(self) -> str:
        """Return a value that tells peppers apart and gives nothing away."""
        return self.digest("raysmith ledger")  # no key digests to it: keys have a prefix


def make_key() -> str:
    """Return a new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def load_pepper(url: URL) -> Pepper | None:
    """Return the pepper of a ledger, or None if there is none yet.

    Raises ConfigError if it is too short or open to others.
    """
    if given := os.environ.get(PEPPER_VARIABLE):
        return Pepper(_checked(given, PEPPER_VARIABLE))
    path = pepper_path(url)
    if not path.exists():
        return None
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:04o}, so others can read or change it. Run: chmod 600 {path}"
        )
    with storage_errors(f"reading {path}"):
        return Pepper(_checked(path.read_text(encoding="utf-8").strip(), str(path)))


def create_pepper(url: URL) -> Pepper:
    """Make the pepper of a new ledger, and its file."""
    secret = secrets.token_hex(32)
    write_private(pepper_path(url), f"{secret}\n".encode())
    return Pepper(secret.encode())


def pepper_path(url: URL) -> Path:
    """Return where a ledger's pepper is kept: beside its file, else in this user's state."""
    if is_file(url):
        path = Path(url.database or "")
        return path.with_name(f"{path.name}.pepper")
    return state_folder() / "postgresql.pepper"


def _checked(text: str, source: str) -> bytes:
    if len(text) < _MIN_LENGTH:
        raise ConfigError(f"{source} has fewer than {_MIN_LENGTH} characters. Use a longer pepper.")
    return text.encode()
