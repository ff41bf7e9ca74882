"""The tasks of a running search: which are wanted, which run, and where their results go.

Takes reports of tasks; gives the next task and, at last, the end of the search. Every result is in
the journal before it counts. It does not know who runs the tasks.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

import cluster.errors
from cluster.errors import ConfigError, RaysmithError, SearchError
from jobs.search.course import Finish, Wanted, decide
from jobs.search.journal import Journal
from jobs.search.pareto import Point, front
from jobs.search.plan import Search
from jobs.search.rungs import measure
from jobs.search.space import Space
from jobs.search.tasks import ALONE, Result, Task
from jobs.search.trial import TrialSpec

# Carried out by the driver, which holds no CPU that a replica needs.
_OF_DRIVER = "serve"


class TaskQueue:
    """Which wanted tasks are running, and where their results go. It knows nothing of Ray."""

    def __init__(
        self, search: Search, journal: Journal, on_result: Callable[[str], None] | None = None
    ) -> None:
        self._search, self._journal = search, journal
        self.running: dict[str, Task] = {}
        self._fatal: RaysmithError | None = None
        self._decision: Wanted | Finish | None = None
        self._print = on_result or _print_progress

    def take(self, key: str) -> TrialSpec | None:
        """Return the next task's spec, or None if none can start now; `key` will name it."""
        if self.is_over:
            return None
        wanted = self._decide()
        assert isinstance(wanted, Wanted), "a search that is over wants no task"
        is_timed = wanted.tasks[0].stage in ALONE
        if len(self.running) >= (1 if is_timed else self._search.config.max_concurrent_trials):
            return None
        for task in wanted.tasks:
            if task not in self.running.values():
                self.running[key] = task
                return self._search.spec(task)
        return None

    def give(self, key: str, found: Mapping[str, Any] | None) -> None:
        """Take a task's report: a result, an error that ends the search, or None if it died."""
        task = self.running.pop(key)
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
        """Whether no further task will ever be wanted of workers."""
        decision = self._decide()
        return self._fatal is not None or isinstance(decision, Finish) or _is_of_driver(decision)

    def end(self) -> Finish | Wanted:
        """Return the end of the search or the driver's own tasks, or raise what ended it."""
        if self._fatal is not None:
            raise self._fatal
        end = self._decide()
        if isinstance(end, Wanted) and not _is_of_driver(end):
            raise SearchError(
                f"the search `{self._search.config.name}` stopped with {len(end.tasks)} tasks "
                "left. Run the same command again: finished trials are kept."
            )
        return end

    def _decide(self) -> Wanted | Finish:
        """Return the decision on the results so far; Tune asks far more often than they change."""
        if self._decision is not None:
            return self._decision
        try:
            self._decision = decide(self._search.space, self._journal.results)
        except (SearchError, ConfigError) as error:
            self._fatal = error
            self._decision = Wanted((), ())
        return self._decision

    def _record(self, task: Task, result: Result) -> None:
        self._journal.record(task, result)
        self._tell(task, result)

    def _tell(self, task: Task, result: Result) -> None:
        before = self._decide()
        self._decision = None
        if isinstance(before, Wanted):
            # Only when all that was wanted is there, something else is.
            left = tuple(each for each in before.tasks if each not in self._journal.results)
            self._decision = Wanted(before.candidates, left) if left else None
        self._print(self._line(task, result))
        if self._decision is None and task.stage == "rung":
            self._print(self._front(task.rung, before))

    def _front(self, rung: int, known: Wanted | Finish) -> str:
        """Return the best so far on a rung: what no other is smaller and better than."""
        space, results = self._search.space, self._journal.results
        base = results[Task(stage="rung", rung=rung)]
        points = []
        for assignment in known.candidates:
            found = results.get(Task(stage="rung", rung=rung, assignment=assignment))
            if assignment and found is not None and found.error is None and not base.error:
                measured = measure(space.config, space.base_bytes, base, found)
                increase = measured.perplexity_increase.point
                points.append(Point(perplexity_increase=increase, size_ratio=measured.size_ratio))
        best = (f"{each.size_ratio:.1%} {each.perplexity_increase:+.2%}" for each in front(points))
        return f"front of rung {rung} (size, perplexity): {'; '.join(best) or 'empty'}"

    def _line(self, task: Task, result: Result) -> str:
        """Return what a result says, for whoever watches."""
        space, seconds = self._search.space, f"{result.seconds:.1f} s"
        what = _what(task, space)
        if result.error is not None:
            return f"{_place(task)}: {what}: {result.error}, {seconds}"
        if result.times is not None:
            uniform = (f"{name} {ms:.1f} ms" for name, ms in result.times.uniform_ms.items())
            return f"a request on uniform models: {', '.join(uniform)}, {seconds}"
        if task.stage == "probe":
            pairs = zip(space.choices, result.divergences, strict=True)
            alone = (f"{choice} {value:.2g}" for choice, value in pairs)
            return f"alone: {what}: {', '.join(alone)} nats, {seconds}"
        if task.stage == "request":
            times = f"{result.request_ms:.1f} ms, bf16 {result.base_request_ms:.1f} ms"
            return f"request: {what}: {times}, {seconds}"
        loss = sum(result.losses) / len(result.losses)
        return f"{_place(task)}: {what}: loss {loss:.4f}, {result.size_bytes:,} bytes, {seconds}"


def _what(task: Task, space: Space) -> str:
    if task.stage == "times":
        return "kernels"
    if task.group is not None:
        return space.groups[task.group].title
    return space.describe(task.assignment)


def _is_of_driver(decision: Wanted | Finish) -> bool:
    if isinstance(decision, Finish) or not decision.tasks:
        return False
    return all(task.stage == _OF_DRIVER for task in decision.tasks)


def _place(task: Task) -> str:
    return f"rung {task.rung}" if task.stage == "rung" else task.stage


def _print_progress(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
