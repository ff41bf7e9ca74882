"""What a search has measured so far, one line a result, so that a killed search goes on.

Takes and gives results; every line is on disk before it counts. It does not know what they mean.
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.errors import ConfigError, IntegrityError
from cluster.storage import digest_bytes, storage_errors
from jobs.search.tasks import Result, Task


class Journal:
    """An append-only file: a first line that says which search this is, then results."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or begin the journal of the search with this fingerprint.

        Raises ConfigError if it belongs to another search, IntegrityError if a line is damaged. A
        last line that a crash cut off is dropped: its trial runs again.
        """
        self.path = path
        self.results: dict[Task, Result] = {}
        lines = self._whole_lines()
        if not lines:
            self._append({"fingerprint": fingerprint})
            return
        self._check_fingerprint(lines[0], fingerprint)
        for number, line in enumerate(lines[1:], start=2):
            document = self._parse(line, number)
            try:
                task = Task.model_validate(document["task"])
                self.results[task] = Result.model_validate(document["result"])
            except (KeyError, ValidationError) as error:
                raise IntegrityError(self._damaged(number, str(error))) from None

    def record(self, task: Task, result: Result) -> None:
        """Add a result; on return it is on disk."""
        self._append({"task": task.model_dump(), "result": result.model_dump(mode="json")})
        self.results[task] = result

    def leave_out(self, task: Task, result: Result) -> None:
        """Add the result of a worker that died to this run only: the next run tries again."""
        self.results[task] = result

    def _append(self, document: dict[str, Any]) -> None:
        body = json.dumps(document, sort_keys=True)
        line = json.dumps({"sha256": digest_bytes(body.encode()), "body": body}) + "\n"
        with storage_errors(f"writing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        with storage_errors(f"reading {self.path}"):
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                os.truncate(self.path, len(whole))
        return whole.splitlines()

    def _check_fingerprint(self, line: bytes, fingerprint: str) -> None:
        if self._parse(line, 1).get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{self.path.parent} holds a search with another configuration, model or data. "
                "Choose another `name`, or delete that folder."
            )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            document = json.loads(line)
            body = document["body"]
            if document["sha256"] != digest_bytes(body.encode()):
                raise IntegrityError(self._damaged(number, "its digest differs"))
            return json.loads(body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(self._damaged(number, str(error))) from None

    def _damaged(self, number: int, why: str) -> str:
        return f"{self.path} line {number} is damaged: {why}. Delete the folder and search again."
