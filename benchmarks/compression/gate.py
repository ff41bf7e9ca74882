"""Whether the gate tells good models from bad ones, on the few sequences that it reads by default.

Takes trials; gives how many bad recipes it accepts and how many equal models it refuses. A recipe
is known to be bad if the lower 95% bound of its increase on the whole test split is at least three
times the limit. Equal models are the dense one, rewritten without a change of what it computes.
Each case is judged on a draw of its own.

Quality alone is on trial: every model is judged with the bytes of its W8A8 form and against no
limit on size or latency, since a copy that is not smaller is refused by design.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.compression.contenders import BITS, CONTENDERS, DENSE, PATTERNS
from benchmarks.compression.estimates import at_most, estimate, increase
from benchmarks.compression.quality import Found
from benchmarks.compression.trial import Trial
from jobs.config import GateConfig
from jobs.evaluation.gate import Measurement, Verdict, judge
from jobs.evaluation.quality import sequence_losses
from jobs.models import decoder
from jobs.models.decoder import Block, Decoder

NUM_CASES = 20
_TIMES_LIMIT = 3
_POOL = tuple(name for name in CONTENDERS if name.endswith((*(f"-{b}" for b in BITS), *PATTERNS)))
Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Bad:
    """A recipe on a model, and the limit of which its increase is at least three times."""

    trial: Trial
    name: str
    lower: float
    limit: float


def measure(
    trials: Sequence[Trial], num_cases: int = NUM_CASES, limits: GateConfig | None = None
) -> Found:
    """Return the counts and every case."""
    limits = (limits or GateConfig()).replace(max_size_ratio=1.0, max_latency_ratio=None)
    bad = [
        _bad_case(case, _draw(case.trial, number, limits), limits)
        for number, case in enumerate(_known_bad(trials, num_cases, limits))
    ]
    equal = [
        _equal_case(trials[number % len(trials)], number, limits) for number in range(num_cases)
    ]
    num_accepted = sum(case["passed"] for case in bad)
    num_refused = sum(not case["passed"] for case in equal)
    section = {
        "sequences": limits.eval_sequences,
        "num_bad": len(bad),
        "num_bad_accepted": num_accepted,
        "num_equal": len(equal),
        "num_equal_refused": num_refused,
        "bad": bad,
        "equal": equal,
    }
    claims = [
        at_most("gate.num_bad_accepted", num_accepted, 0),
        at_most("gate.num_equal_refused", num_refused, 1),
    ]
    return {"gate": section}, claims


def equal_copy(model: Decoder, seed: int) -> Decoder:
    """Return the model, changed in place: its MLPs' channels in another order and scale.

    Scales are powers of two between `up_proj` and `down_proj`, which floating point carries out
    exactly; only the order of sums changes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            assert isinstance(block, Block), "a decoder has blocks"
            mlp = block.mlp
            width = mlp.up_proj.weight.shape[0]
            order = torch.randperm(width, generator=generator)
            scale_F = torch.exp2(torch.randint(-2, 3, (width,), generator=generator).float())
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order] * scale_F[:, None])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order] / scale_F)
    return model


def _known_bad(trials: Sequence[Trial], num_cases: int, limits: GateConfig) -> list[Bad]:
    """Return the least bad recipes at the gate's own limit; others at a third of their increase."""
    found = []
    for trial in trials:
        for name in _POOL:
            losses = {name: trial.losses(name), DENSE: trial.losses(DENSE)}
            lower = estimate([losses], increase(name, DENSE)).lower
            if lower > 0:
                limit = min(limits.max_perplexity_increase, lower / _TIMES_LIMIT)
                found.append(Bad(trial, name, lower, limit))
    least = limits.max_perplexity_increase * _TIMES_LIMIT
    found.sort(key=lambda bad: (bad.lower < least, abs(bad.lower - least)))
    return found[:num_cases]


def _bad_case(bad: Bad, rows: slice, limits: GateConfig) -> dict[str, Any]:
    limits = limits.replace(max_perplexity_increase=bad.limit)
    verdict = _judge(bad.trial, bad.trial.losses(bad.name)[rows], rows, limits)
    return {"model": bad.trial.name, "recipe": bad.name, "lower": bad.lower, **_document(verdict)}


def _equal_case(trial: Trial, number: int, limits: GateConfig) -> dict[str, Any]:
    rows = _draw(trial, number, limits)
    copy = equal_copy(decoder.load(trial.model), number)
    verdict = _judge(trial, sequence_losses(copy, trial.sequences[rows]), rows, limits)
    return {"model": trial.name, "rewrite": number, **_document(verdict)}


def _judge(trial: Trial, losses: Losses, rows: slice, limits: GateConfig) -> Verdict:
    base_bytes, size_bytes = trial.size_bytes(DENSE), trial.size_bytes("w8a8")
    assert base_bytes is not None, "a contender"
    measured = Measurement.from_losses(
        trial.losses(DENSE)[rows],
        losses,
        limits,
        size_bytes=size_bytes,
        base_size_bytes=base_bytes,
    )
    return judge(measured, limits)


def _draw(trial: Trial, number: int, limits: GateConfig) -> slice:
    """Return which sequences a case reads; they lie in random order, so any in a row will do."""
    size = limits.eval_sequences
    start = number % (len(trial.sequences) // size) * size
    return slice(start, start + size)


def _document(verdict: Verdict) -> dict[str, Any]:
    numbers = verdict.numbers
    return {
        "passed": verdict.passed,
        "limit": numbers["max_perplexity_increase"],
        "increase": numbers["perplexity_increase"],
        "increase_upper95": numbers["perplexity_increase_upper95"],
        "reasons": list(verdict.reasons),
    }
