"""How a benchmark talks to an engine in another process: one JSON line a run.

Takes arrivals on standard input; gives the time of every token on standard output. The engine's
own output goes to standard error. It does not know any engine.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class Arrival:
    """A request that comes `at_s` after the start; `times_s` is filled with its tokens' times."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether every token was generated."""
        return len(self.times_s) >= self.max_tokens


class Clock:
    """Seconds since a run began."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        """Return the seconds since the run began."""
        return time.perf_counter() - self._start_s

    def wait_until(self, at_s: float) -> None:
        """Sleep until a moment of the run."""
        time.sleep(max(0.0, at_s - self.now_s()))


Run = Callable[[list[Arrival], Clock], None]


def serve(load: Callable[[], tuple[Run, dict[str, Any]]]) -> int:
    """Load an engine, say so, then answer one line after another until standard input ends."""
    _end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Engines print; the answers' pipe is clean.
    run, facts = load()
    _say(answers, {"ready": True, **facts})
    for line in sys.stdin:
        arrivals = [Arrival(*item) for item in json.loads(line)["arrivals"]]
        run(arrivals, Clock())
        _say(
            answers,
            {"times_s": [a.times_s for a in arrivals], "tokens": [a.tokens for a in arrivals]},
        )
    return 0


def _say(answers: Any, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


def _end_with_parent() -> None:
    """Have the system kill this process when its parent ends: one that is stopped reads no end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
