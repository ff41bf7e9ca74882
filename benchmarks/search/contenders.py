"""Ways to look for compressed models, each given the same seconds of trials.

Takes a prepared search; gives for every contender the models it measured in full, and the seconds
that took. All choose from one space, and all their models are measured as the search's last rung
measures: with real kernels, on the same sequences, each request timed beside the unchanged model.

- ours: `jobs.search`, probes, table of kernels and rungs included in its seconds.
- random: every group's choice drawn evenly.
- tpe: Optuna's multi-objective TPE (Ozaki et al. 2022), a parameter a group.
- knapsack: the additive front of loss against bytes (probes included), evenly over the bytes.
- knapsack3: the same with a price for latency, by the table of kernels; those that are predicted to
  dominate most.
- uniform: one format everywhere.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import optuna

from cluster.errors import ConfigError
from jobs.config import SearchConfig
from jobs.search.course import Wanted, decide, first_forecast
from jobs.search.forecast import Forecast, knapsack_front, uniform_assignments
from jobs.search.knapsack import priced
from jobs.search.pareto import Point, hypervolume, shares, spread
from jobs.search.plan import Search
from jobs.search.rungs import measure
from jobs.search.space import UNCHANGED, Assignment
from jobs.search.tasks import Result, Task
from jobs.search.trial import run_trial

Say = Callable[[str], None]
_MOST_REPEATS = 20
_MOST_ASKED = 1000  # A contender that asks for what it knows already costs nothing.


@dataclass
class Bench:
    """A search whose tasks run here; a model that several contenders pick is measured once."""

    search: Search
    say: Say
    results: dict[Task, Result] = field(default_factory=dict)

    @property
    def config(self) -> SearchConfig:
        """The search's configuration."""
        return self.search.config

    def run(self, task: Task) -> Result:
        """Carry out one task, once."""
        if task not in self.results:
            result = run_trial(self.search.spec(task))
            if result.times is not None:  # It may have been remembered from an earlier run.
                result = result.replace(seconds=result.times.seconds)
            self.results[task] = result
        return self.results[task]

    def last_rung(self, assignment: Assignment) -> Task:
        """Return the task that measures a model in full."""
        return Task(stage="rung", rung=len(self.config.rungs) - 1, assignment=assignment)

    def measure(self, assignment: Assignment) -> float:
        """Measure a model as the search measures those of its last rung; return the seconds."""
        seconds = self.run(self.last_rung(assignment)).seconds
        if assignment:
            seconds += self.run(Task(stage="request", assignment=assignment)).seconds
        return seconds

    def point(self, assignment: Assignment) -> Point:
        """Return a measured model's place: quality, bytes, and its request over bf16's."""
        base, found = (self.results[self.last_rung(each)] for each in (UNCHANGED, assignment))
        request = self.results[Task(stage="request", assignment=assignment)]
        measured = measure(self.config, self.search.space.base_bytes, base, found)
        assert request.request_ms is not None, "a model that was measured is timed"
        assert request.base_request_ms, "beside the unchanged one"
        return Point(
            perplexity_increase=measured.perplexity_increase.point,
            size_ratio=measured.size_ratio,
            latency_ratio=request.request_ms / request.base_request_ms,
        )

    def hypervolume(self, assignments: Sequence[Assignment]) -> float:
        """Return the share of the worse that these models dominate; see `pareto.shares`."""
        points = [self.point(each) for each in assignments]
        return hypervolume([shares(point, self.config.gate) for point in points])


@dataclass(frozen=True)
class Found:
    """What a contender measured in full, and what its trials took."""

    models: tuple[Assignment, ...]
    seconds: float


def play_ours(bench: Bench) -> tuple[Found, Forecast]:
    """Run the search up to the gate: what follows is no search any more."""
    space, mine, seconds = bench.search.space, dict[Task, Result](), 0.0
    while True:
        wanted = decide(space, mine)
        assert isinstance(wanted, Wanted), "the gate comes before the end"
        if wanted.tasks[0].stage == "gate":
            break
        for task in wanted.tasks:
            mine[task] = bench.run(task)
            seconds += mine[task].seconds
        bench.say(f"ours: {len(mine)} tasks, {seconds:.0f} s")
    models = [task.assignment for task in mine if task.stage == "request"]
    return Found(tuple(models), seconds), first_forecast(space, mine)


def play(
    name: str,
    bench: Bench,
    budget_s: float,
    ask: Iterator[Assignment],
    tell: Callable[[Assignment], None] = lambda assignment: None,
    spent_s: float = 0.0,
) -> Found:
    """Measure what a contender asks for, until the seconds of the trials reach the budget.

    A model that it asks for again costs nothing. The unchanged model is counted for all.
    """
    seconds = spent_s + bench.measure(UNCHANGED)
    models: dict[Assignment, None] = {}
    for num_asked, assignment in enumerate(ask, start=1):
        if assignment not in models and bench.search.space.changes(assignment):
            seconds += bench.measure(assignment)
            models[assignment] = None
            tell(assignment)
        if seconds >= budget_s or num_asked > _MOST_ASKED:
            break
    bench.say(f"{name}: {len(models)} models, {seconds:.0f} s")
    return Found(tuple(models), seconds)


def random_assignments(bench: Bench) -> Iterator[Assignment]:
    """Give assignments drawn evenly."""
    space = bench.search.space
    generator = random.Random(bench.config.seed)
    while True:
        yield tuple(generator.randrange(len(space.choices)) for _ in space.groups)


def play_tpe(bench: Bench, budget_s: float) -> Found:
    """Let Optuna's TPE choose, told of the three objectives as shares of the worst.

    Where it asks for nothing but what it knows it is given something random.
    """
    space = bench.search.space
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=bench.config.seed)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    names = list(range(len(space.choices)))
    asked: list[optuna.Trial] = []

    def ask() -> Iterator[Assignment]:
        others, num_repeats = random_assignments(bench), 0
        while True:
            if num_repeats >= _MOST_REPEATS:
                titles = [group.title for group in space.groups]
                study.enqueue_trial(dict(zip(titles, next(others), strict=True)))
            trial = study.ask()
            asked.append(trial)
            yield tuple(trial.suggest_categorical(group.title, names) for group in space.groups)
            num_repeats = 0 if trial.number in told else num_repeats + 1
            if num_repeats:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)

    told: set[int] = set()

    def tell(assignment: Assignment) -> None:
        told.add(asked[-1].number)
        study.tell(asked[-1], list(shares(bench.point(assignment), bench.config.gate)))

    return play("tpe", bench, budget_s, ask(), tell)


def play_knapsack(
    bench: Bench, forecast: Forecast, budget_s: float, *, with_latency: bool
) -> Found:
    """Measure a front of the additive knapsack, as many of its models as the budget allows."""
    space = bench.search.space
    probes_s = sum(found.seconds for task, found in bench.results.items() if task.stage == "probe")
    if with_latency:
        probes_s += bench.results[Task(stage="times")].seconds
        pool = knapsack_front(forecast)
        order = spread([forecast.objectives(each) for each in pool], len(pool))
        chosen = [pool[place] for place in order]
        return play("knapsack3", bench, budget_s, iter(chosen), spent_s=probes_s)
    size_SC = -space.saved_bytes_SC.astype(float)
    front = sorted(set(priced(forecast.predictor.rises_SC, size_SC)), key=space.size_bytes)
    limit = bench.config.gate.max_perplexity_increase
    front = [each for each in front if math.expm1(forecast.predictor.rise(each)) < 2 * limit]
    return play("knapsack", bench, budget_s, iter(evenly(front)), spent_s=probes_s)


def evenly(ordered: Sequence[Assignment]) -> list[Assignment]:
    """Return all of a sequence, so that every beginning of it is spread over the whole."""
    chosen: list[int] = []
    for step in range(1, len(ordered) + 1):
        for place in np.linspace(0, len(ordered) - 1, step).round().astype(int):
            if int(place) not in chosen:
                chosen.append(int(place))
    return [ordered[place] for place in chosen]


def compare(bench: Bench) -> dict[str, Found]:
    """Let every contender search, ours first: its seconds are the others' budget."""
    ours, forecast = play_ours(bench)
    budget_s = ours.seconds
    found = {"ours": ours}
    uniform = uniform_assignments(bench.search.space)
    found["uniform"] = play("uniform", bench, math.inf, iter(uniform))
    found["knapsack"] = play_knapsack(bench, forecast, budget_s, with_latency=False)
    found["knapsack3"] = play_knapsack(bench, forecast, budget_s, with_latency=True)
    found["tpe"] = play_tpe(bench, budget_s)
    found["random"] = play("random", bench, budget_s, random_assignments(bench))
    return found


def ratios(volumes: Mapping[str, float]) -> dict[str, float]:
    """Return ours over each other contender's hypervolume, less 1."""
    return {
        name: _over(volumes["ours"], volume) for name, volume in volumes.items() if name != "ours"
    }


def _over(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 0.0
    if theirs == 0.0:
        raise ConfigError(
            "a contender found no model within the limits, so there is no ratio to it. Raise "
            "`max_perplexity_increase` of the benchmark's search."
        )
    return ours / theirs - 1
