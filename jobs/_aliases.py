"""The aliases of one published model and how they came about.

Takes and gives values; reading and writing one small file whole is all the I/O. It does not know
which versions exist.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cluster.config import StrictModel
from cluster.errors import IntegrityError
from cluster.storage import digest_bytes, write_json


class AliasEvent(StrictModel):
    """One change of an alias."""

    action: Literal["promote", "roll_back"]
    alias: str
    version: str
    at: str


class Aliases(StrictModel):
    """Every change ever made; what an alias means now follows from replaying them."""

    history: tuple[AliasEvent, ...] = ()

    def current(self, alias: str) -> str | None:
        """Return the version an alias names, or None."""
        stack = self._stack(alias)
        return stack[-1] if stack else None

    def previous(self, alias: str) -> str | None:
        """Return the version a roll-back would return to, or None."""
        stack = self._stack(alias)
        return stack[-2] if len(stack) > 1 else None

    def promoted(self, alias: str, version: str, at: str) -> "Aliases":
        """Return the aliases after a promotion."""
        return self._with(AliasEvent(action="promote", alias=alias, version=version, at=at))

    def rolled_back(self, alias: str, at: str) -> "Aliases":
        """Return the aliases after a roll-back to `previous`."""
        version = self.previous(alias)
        assert version is not None, f"nothing before the present {alias}"
        return self._with(AliasEvent(action="roll_back", alias=alias, version=version, at=at))

    def _with(self, event: AliasEvent) -> "Aliases":
        return Aliases(history=(*self.history, event))

    def _stack(self, alias: str) -> list[str]:
        stack: list[str] = []
        for event in self.history:
            if event.alias != alias:
                continue
            if event.action == "promote":
                stack.append(event.version)
            else:
                stack.pop()
        return stack


def read_aliases(path: Path) -> Aliases:
    """Read the file, or none if it does not exist; IntegrityError if it is damaged."""
    try:
        document = json.loads(path.read_bytes())
        body = {"history": document["history"]}
        if document["self_sha256"] != _digest(body):
            raise IntegrityError(_damaged(path, "its own digest differs"))
        return Aliases.model_validate(body)
    except FileNotFoundError:
        return Aliases()
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise IntegrityError(_damaged(path, str(error))) from None


def write_aliases(path: Path, aliases: Aliases) -> None:
    """Write the file whole, with its own digest."""
    body = aliases.model_dump(mode="json")
    write_json(path, {**body, "self_sha256": _digest(body)})


def _digest(body: dict[str, object]) -> str:
    return digest_bytes(json.dumps(body, sort_keys=True).encode())


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}. Restore it, or delete it and promote again."
