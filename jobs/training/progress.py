"""The progress of a run on standard error: step, loss, tokens/s, share of peak.

Takes a run's folder and follows its metrics file, which the first worker writes wherever it runs;
gives one live line on a terminal, else a line every so many steps. It does not know the workers.
"""

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.training.metrics_file import METRICS_FILE

_POLL_S = 0.5
_TAIL_BYTES = 8192


class ProgressLine:
    """Shows a run's newest step until it is left."""

    def __init__(
        self, run_dir: Path, *, max_steps: int, log_every_steps: int, console: Console | None = None
    ) -> None:
        self._path = run_dir / METRICS_FILE
        self._max_steps = max_steps
        self._log_every_steps = log_every_steps
        self._console = console or Console(stderr=True)
        self._shown_step = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        self._task = self._progress.add_task("training", total=self._max_steps, text="starting")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._progress.stop()
        self._show(is_last=True)

    def _follow(self) -> None:
        while not self._done.wait(_POLL_S):
            self._show(is_last=False)

    def _show(self, *, is_last: bool) -> None:
        newest = _newest_step(self._path)
        if newest is None:
            return
        step, text = int(newest["step"]), describe(newest)
        self._progress.update(self._task, completed=step, text=text)
        due = self._shown_step + self._log_every_steps
        is_new = step >= due or (is_last and step != self._shown_step)
        if is_new and (is_last or not self._console.is_terminal):
            self._shown_step = step
            line = f"step {step}/{self._max_steps}  {text}"
            self._console.print(line, highlight=False, soft_wrap=True)


def describe(entry: dict[str, Any]) -> str:
    """Return one step's line of metrics as text for people."""
    speed = f"loss {entry['loss']:.4f}  {entry['tokens_per_s']:,.0f} tokens/s"
    return speed if entry["mfu"] is None else f"{speed}  {entry['mfu']:.1%} of peak"


def _newest_step(path: Path) -> dict[str, Any] | None:
    """Return the last whole line about a step, or None if there is none yet."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            whole, _, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(whole.splitlines()):
        if line.startswith(b'{"step"') and b'"loss"' in line:
            entry: dict[str, Any] = json.loads(line)
            return entry
    return None
