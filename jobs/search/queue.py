"""The tasks of a running search: which are wanted, which run, and where their results go.

Takes reports of tasks; gives the next task and, at last, the end of the search. Every result is in
the journal before it counts. It does not know who runs the tasks.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

import cluster.errors
from cluster.errors import RaysmithError, SearchError
from jobs.search.journal import Journal
from jobs.search.plan import Search
from jobs.search.rungs import Finish, Result, Task, decide
from jobs.search.space import describe
from jobs.search.trial import TrialSpec


class TaskQueue:
    """Which wanted tasks are running, and where their results go. It knows nothing of Ray."""

    def __init__(
        self, search: Search, journal: Journal, on_result: Callable[[str], None] | None = None
    ) -> None:
        self._search, self._journal = search, journal
        self._running: dict[str, Task] = {}
        self._fatal: RaysmithError | None = None
        self._decision: list[Task] | Finish | None = None
        self._print = on_result or _print_progress

    def take(self, key: str) -> TrialSpec | None:
        """Return the next task's spec, or None if none can start now; `key` will name it."""
        if self.is_over or len(self._running) >= self._search.config.max_concurrent_trials:
            return None
        wanted = self._decide()
        assert not isinstance(wanted, Finish), "a search that is over wants no task"
        for task in wanted:
            if task not in self._running.values():
                self._running[key] = task
                return self._search.spec(task)
        return None

    def give(self, key: str, found: Mapping[str, Any] | None) -> None:
        """Take a task's report: a result, an error that ends the search, or None if it died."""
        task = self._running.pop(key)
        if found is None:
            failed = Result(error="its worker died or raised, twice; Ray's log says why")
            self._journal.leave_out(task, failed)
            self._tell(task, failed)
        elif "fatal" in found:
            self._fatal = getattr(cluster.errors, found["fatal_class"])(found["fatal"])
        else:
            self._record(task, Result.model_validate(json.loads(found["result"])))

    @property
    def is_over(self) -> bool:
        """Whether no further task will ever be wanted."""
        return self._fatal is not None or isinstance(self._decide(), Finish)

    def end(self) -> Finish:
        """Return the end of the search, or raise the error that ended it."""
        if self._fatal is not None:
            raise self._fatal
        end = self._decide()
        if not isinstance(end, Finish):
            raise SearchError(
                f"the search `{self._search.config.name}` stopped with {len(end)} tasks left. Run "
                "the same command again: finished trials are kept."
            )
        return end

    def _decide(self) -> list[Task] | Finish:
        """Return the decision on the results so far; Tune asks far more often than they change."""
        if self._decision is not None:
            return self._decision
        search = self._search
        try:
            self._decision = decide(
                search.config, len(search.recipes), search.base_bytes, self._journal.results
            )
        except SearchError as error:
            self._fatal = error
            self._decision = Finish(winner=None, verdicts={}, finalists=())
        return self._decision

    def _record(self, task: Task, result: Result) -> None:
        self._journal.record(task, result)
        self._tell(task, result)

    def _tell(self, task: Task, result: Result) -> None:
        self._decision = None
        stage = "gate" if task.rung == len(self._search.config.rungs) else f"rung {task.rung}"
        quality = result.error or f"loss {sum(result.losses) / len(result.losses):.4f}"
        recipe = describe(self._search.recipes[task.candidate])
        size = f", {result.size_bytes:,} bytes" if result.error is None else ""
        self._print(f"{stage}: {recipe}: {quality}{size}, {result.seconds:.1f} s")


def _print_progress(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
