"""The one thread of an engine: commands from everywhere, one pass after another, then an end.

Takes commands from any thread and an engine's work; carries the commands out between passes. It
does not know what a command or a pass is.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from cluster.errors import EngineError

_logger = logging.getLogger(__name__)
_CLOSE_TIMEOUT_S = 30.0
CommandT = TypeVar("CommandT")


@dataclass(frozen=True)
class Work(Generic[CommandT]):
    """What an engine does on its thread, and on no other.

    `is_idle()`: there is nothing to compute before another command. `take(command)` carries one
    out, `tick()` makes a pass. `end(failure, commands)` tells everybody who waits; these commands
    were not carried out.
    """

    is_idle: Callable[[], bool]
    take: Callable[[CommandT], None]
    tick: Callable[[], None]
    end: Callable[[EngineError, list[CommandT]], None]


class _Close:
    pass


class EngineThread(Generic[CommandT]):
    """Runs an engine's work until it is closed or the work raises."""

    def __init__(self, name: str, work: Work[CommandT]) -> None:
        """Start the thread, which may call the work from now on."""
        self._work = work
        self._commands: SimpleQueue[CommandT | _Close] = SimpleQueue()
        self._lock = threading.Lock()  # A command is in the queue before the end, or refused.
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise EngineError if the thread ended."""
        if self._failure is not None:
            raise EngineError(self._failure.message)

    def submit(self, command: CommandT) -> None:
        """Have a command carried out, or given to `end`; raises EngineError if the thread ended."""
        with self._lock:
            self.check()
            self._commands.put(command)

    def send(self, command: CommandT) -> None:
        """Have a command carried out if the thread still runs."""
        self._commands.put(command)

    def close(self) -> None:
        """Stop the thread after the pass that it is in."""
        self._commands.put(_Close())
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _serve(self) -> None:
        try:
            while self._take_commands():
                self._work.tick()
            failure = EngineError("the engine was closed. Start another one.")
        except BaseException as error:  # A panic of Rust code is no Exception.
            _logger.exception("the engine stopped")
            failure = EngineError(f"the engine stopped: {type(error).__name__}: {error}")
        with self._lock:
            self._failure = failure
        self._work.end(failure, self._left())

    def _take_commands(self) -> bool:
        """Carry out what was asked since the last pass, waiting while idle; False to stop."""
        while self._work.is_idle() or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Close):
                return False
            self._work.take(command)
        return True

    def _left(self) -> list[CommandT]:
        commands = []
        while not self._commands.empty():
            command = self._commands.get()
            if not isinstance(command, _Close):
                commands.append(command)
        return commands
