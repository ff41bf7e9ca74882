"""Whoever answers requests: an engine in a process of its own.

Takes requests; gives the times of their tokens. It does not know what is compared.
"""

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from benchmarks.serving.models import ROOT
from benchmarks.serving.workload import Answers, Request
from cluster.errors import EngineError

_START_TIMEOUT_S = 300.0
_RUN_TIMEOUT_S = 600.0


class Contender(Protocol):
    """Answers requests."""

    def run(self, requests: Sequence[Request]) -> Answers:
        """Return the times of the tokens of every request."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class Process:
    """A module of benchmarks.peers, run by the Python of its environment.

    It stands still while it answers nothing: some engines wake up often enough, idle, to slow
    others down by a twentieth.
    """

    def __init__(self, python: Path, module: str, arguments: Sequence[str], log: Path) -> None:
        """Start it and wait until its model is loaded; its output goes to `log`."""
        self._name = f"{module} {' '.join(arguments)}"
        self._log_path = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{module}", *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "PATH": f"{python.parent}:{os.environ['PATH']}",
                },
            )
        self.facts: Mapping[str, Any] = self._read(_START_TIMEOUT_S)
        self._process.send_signal(signal.SIGSTOP)
        self.last_tokens: list[list[int]] = []

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, requests: Sequence[Request]) -> Answers:
        """Return the times of the tokens of every request."""
        arrivals = [[r.at_s, list(r.prompt), r.max_tokens] for r in requests]
        assert self._process.stdin is not None, "the pipe was asked for"
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"arrivals": arrivals}) + "\n")
        self._process.stdin.flush()
        answer = self._read(_RUN_TIMEOUT_S)
        self._process.send_signal(signal.SIGSTOP)
        self.last_tokens = answer["tokens"]
        return Answers(tuple(requests), tuple(tuple(times) for times in answer["times_s"]))

    def close(self) -> None:
        """End its input, which ends it."""
        assert self._process.stdin is not None, "the pipe was asked for"
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None, "the pipe was asked for"
        self._process.stdout.close()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None, "the pipe was asked for"
        is_ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if is_ready else ""
        if not line:
            self._process.kill()
            tail = self._log_path.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise EngineError(f"{self._name} gave no answer within {timeout_s:.0f} s:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found
