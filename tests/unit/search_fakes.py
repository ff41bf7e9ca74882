"""A small search space whose candidates are scored by a formula."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jobs.config import DecoderConfig, GateConfig, Rung, SearchConfig, Workload
from jobs.evaluation.gate import Checks
from jobs.evaluation.intervals import Interval
from jobs.evaluation.kernel_times import PRODUCTS, KernelTimes, spell
from jobs.search.course import Finish, Wanted, decide
from jobs.search.forecast import Forecast
from jobs.search.predictor import Predictor
from jobs.search.space import Space, build_space, layout_of
from jobs.search.tasks import Result, Task

DECODER = DecoderConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
)
# Nats that a format adds in one group, and milliseconds that a product takes in it.
RISES = {"bf16": 0.0, "w8a8": 0.0005, "w4a16": 0.002, "w4a8": 0.0025, "w3a16": 0.02}
PRODUCT_MS = {"bf16": 2.0, "w8a8": 1.0, "w4a16": 1.2, "w4a8": 0.8, "w3a16": 1.2}
LOSSES = (3.0, 3.5) * 4


def config(**changes: object) -> SearchConfig:
    values: dict[str, object] = {
        "name": "s",
        "model": "m",
        "data": "d",
        "num_trials": 8,
        "rungs": (Rung(eval_sequences=8, keep_ratio=0.5), Rung(eval_sequences=8, real=True)),
        "gate": GateConfig(eval_sequences=8, bootstrap_samples=100, max_size_ratio=0.7),
    }
    return SearchConfig.model_validate({**values, **changes})


def space(**changes: object) -> Space:
    return build_space(config(**changes), DECODER)


def times(of: Space) -> KernelTimes:
    layouts = {choice.scheme: layout_of(choice.scheme, of.decoder) for choice in of.choices}
    layouts["bf16"] = layout_of("bf16", of.decoder)
    blocks, products = of.decoder.num_layers, len(PRODUCTS)
    return KernelTimes(
        workload=Workload(),
        num_threads=1,
        product_ms={
            spell(layout): dict.fromkeys(PRODUCTS, PRODUCT_MS[scheme])
            for scheme, layout in layouts.items()
        },
        rest_ms=4.0,
        base_ms=4.0 + blocks * products * PRODUCT_MS["bf16"],
        seconds=1.0,
        uniform_ms={
            spell(layout): 4.0 + blocks * products * PRODUCT_MS[scheme]
            for scheme, layout in layouts.items()
        },
    )


def alone(of: Space) -> np.ndarray:
    """What each choice of each group adds: later groups twice what the first ones add."""
    weights = np.linspace(1.0, 2.0, len(of.groups))
    return np.array([[w * RISES[choice.scheme] for choice in of.choices] for w in weights])


def forecast(of: Space) -> Forecast:
    return Forecast.of(of, times(of), Predictor(alone(of)))


def answer(of: Space, task: Task) -> Result:
    """Return what a worker would: rises of the loss are sums, times those of the table."""
    if task.stage == "times":
        return Result(times=times(of))
    if task.stage == "probe":
        assert task.group is not None
        return Result(divergences=tuple(alone(of)[task.group]))
    known = forecast(of)
    assignment = task.assignment
    request_ms = known.latency_ms(assignment)
    if task.stage in ("request", "serve"):
        added_ms = 5.0 if task.stage == "serve" else 0.0
        return Result(request_ms=request_ms + added_ms, base_request_ms=known.base_ms + added_ms)
    checks = Checks(
        latency_ms=request_ms / 32,
        base_latency_ms=known.base_ms / 32,
        latency_change=Interval(point=0.9, lower=0.8, upper=1.0),
    )
    return Result(
        losses=tuple(loss + known.predictor.rise(assignment) for loss in LOSSES),
        size_bytes=of.size_bytes(assignment),
        memory_bytes=of.memory_bytes(assignment),
        checks=checks if task.stage == "gate" and assignment else Checks(),
    )


def play(
    of: Space,
    results: Mapping[Task, Result] | None = None,
    change: Callable[[Task, Result], Result] = lambda task, result: result,
) -> tuple[Finish, list[Wanted], dict[Task, Result]]:
    """Answer every wanted task to the end; return it, the waves of tasks and all results."""
    done, waves = dict(results or {}), []
    while isinstance(wanted := decide(of, done), Wanted):
        assert wanted.tasks, "nothing is wanted and there is no end"
        waves.append(wanted)
        for task in wanted.tasks:
            done[task] = change(task, answer(of, task))
    return wanted, waves, done


def stages(waves: Sequence[Wanted]) -> list[tuple[str, int]]:
    return [(wave.tasks[0].stage, wave.tasks[0].rung) for wave in waves]


__all__ = ["DECODER", "answer", "config", "forecast", "play", "space", "stages", "times"]
