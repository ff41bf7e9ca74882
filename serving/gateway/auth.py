"""API keys in a file that only its owner can read: made once, kept as digests, checked per request.

Takes a path; gives the name behind a key. It does not know HTTP. A line is `name:sha256`; keys are
256 random bits, so a plain digest cannot be turned back.
"""

import hashlib
import re
import secrets
import stat
from pathlib import Path

from cluster.errors import ConfigError
from cluster.storage import check_name, write_atomic

_PREFIX = "rs-"
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*):([0-9a-f]{64})")
_Stamp = tuple[int, int, int]


class KeyRing:
    """The keys of one file; a changed file is read again, so a removed key stops at once."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError if it is missing, open to others, wrong or empty."""
        self._path = path
        self._stamp = _stamp(path)
        self._names = _read(path)

    def owner(self, key: str) -> str | None:
        """Return the name behind a key, or None if there is no such key."""
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._names = _read(self._path)
            self._stamp = stamp
        return self._names.get(_digest(key))


def make_key(path: Path, name: str) -> str:
    """Add a new key to the file, made with mode 0600 if need be, and return it: it is kept nowhere.

    Raises ConfigError if the name is not allowed or already there.
    """
    check_name(name, "key name")
    existing = _text(path) if path.exists() else ""
    if path.exists() and name in _parse(path).values():
        raise ConfigError(f"{path} has a key `{name}`. Choose another name, or remove its line.")
    key = _PREFIX + secrets.token_urlsafe(32)
    separator = "" if not existing or existing.endswith("\n") else "\n"
    line = f"{name}:{_digest(key)}\n"
    write_atomic(path, f"{existing}{separator}{line}".encode(), mode=0o600)
    return key


def _read(path: Path) -> dict[str, str]:
    """Return names by digest, at least one."""
    names = _parse(path)
    if not names:
        raise ConfigError(f"{path} has no keys. Make one with `raysmith keys new`.")
    return names


def _parse(path: Path) -> dict[str, str]:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{path} has mode {mode:04o}, so others can read or change it. Run: chmod 600 {path}"
        )
    names: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(f"{path}, line {number}: expected name:sha256 in hexadecimal.")
        if match[1] in names.values():
            raise ConfigError(f"{path}, line {number}: a second key `{match[1]}`.")
        names[match[2]] = match[1]
    return names


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise _unreadable(path, "it is not UTF-8 text") from None


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    return status.st_ctime_ns, status.st_ino, status.st_size


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"the file of API keys {path} cannot be read: {reason}. Make one with `raysmith keys new`."
    )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
