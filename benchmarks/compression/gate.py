"""Whether the gate tells good models from bad ones, on the few sequences that it reads by default.

Takes trials; gives how many bad recipes it accepts and how many equal models it refuses. A recipe
is known to be bad if the lower 95% bound of its increase on the whole test split is at least three
times the limit; quality alone is on trial then, with the bytes of the W8A8 form. Equal models are
copies (see copies.py), judged by all that the gate judges. Each case is judged on a draw of its
own; a recipe that is judged twice, on different ones. No share of the bytes is a limit here, only
that they are fewer: much of a small model is its embedding, which no recipe touches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compression.contenders import BITS, CONTENDERS, DENSE, PATTERNS
from benchmarks.compression.copies import copies_of
from benchmarks.compression.estimates import at_least, at_most, estimate, increase
from benchmarks.compression.quality import Found, Section
from benchmarks.compression.trial import Trial
from cluster.errors import ConfigError
from jobs.config import GateConfig
from jobs.evaluation.gate import Measurement, Verdict, judge

NUM_CASES = 20
_TIMES_LIMIT = 3
_REFUSED = 1
# Copies in W8A8 are what a user would compare; dense ones the easier case, whose noise is none.
_EQUAL = {"w8a8": "equal", DENSE: "equal_dense"}
_POOL = tuple(name for name in CONTENDERS if name.endswith((*(f"-{b}" for b in BITS), *PATTERNS)))
# What is judged of a copy beside its perplexity.
_OF_EQUAL = (
    "size_ratio",
    "latency_ratio",
    "latency_ratio_lower95",
    "agreement",
    "agreement_lower95",
    "min_agreement",
)
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
    check_enough(min(len(trial.sequences) for trial in trials), limits)
    bad = _bad_cases(trials, num_cases, limits)
    num_accepted = sum(case["passed"] for case in bad)
    section: Section = {
        "sequences": limits.eval_sequences,
        "num_bad": len(bad),
        "num_bad_accepted": num_accepted,
        "bad": bad,
    }
    claims = [
        at_least("gate.num_bad", len(bad), NUM_CASES),
        at_most("gate.num_bad_accepted", num_accepted, 0),
    ]
    for kind, key in _EQUAL.items():
        equal = _equal_cases(trials, kind, num_cases, limits)
        num_refused = sum(not case["passed"] for case in equal)
        section |= {f"num_{key}": len(equal), f"num_{key}_refused": num_refused, key: equal}
        claims.append(at_least(f"gate.num_{key}", len(equal), NUM_CASES))
        claims.append(at_most(f"gate.num_{key}_refused", num_refused, _REFUSED))
    return {"gate": section}, claims


def check_enough(num_sequences: int, limits: GateConfig | None = None) -> None:
    """Raise ConfigError for fewer held-out sequences than the gate reads for one verdict."""
    needed = (limits or GateConfig()).eval_sequences
    if num_sequences < needed:
        raise ConfigError(
            f"the gate reads {needed} held-out sequences for a verdict, and there are "
            f"{num_sequences}. Give `--sequences` {needed} or more, leave it out, or leave out the "
            "section `gate` by `--only`."
        )


def _bad_cases(trials: Sequence[Trial], num_cases: int, limits: GateConfig) -> list[dict[str, Any]]:
    """Judge the least bad recipes, each on as many draws as it takes to reach the number."""
    known = _known_bad(trials, limits)
    num_draws = min(_num_draws(trial, limits) for trial in trials)
    pairs = [
        (bad, number + turn)  # No recipe meets a draw twice.
        for turn in range(num_draws)
        for number, bad in enumerate(known)
    ]
    return [_bad_case(bad, draw, limits) for bad, draw in pairs[:num_cases]]


def _known_bad(trials: Sequence[Trial], limits: GateConfig) -> list[Bad]:
    """Return bad recipes, the least bad at the gate's own limit first.

    Others, at a third of their increase, come last.
    """
    found = []
    for trial in trials:
        for name in _POOL:
            losses = {name: trial.losses(name), DENSE: trial.losses(DENSE)}
            lower = estimate([losses], increase(name, DENSE)).lower
            if lower > 0:
                limit = min(limits.max_perplexity_increase, lower / _TIMES_LIMIT)
                found.append(Bad(trial, name, lower, limit))
    least = limits.max_perplexity_increase * _TIMES_LIMIT
    return sorted(found, key=lambda bad: (bad.lower < least, abs(bad.lower - least)))


def _bad_case(bad: Bad, draw: int, limits: GateConfig) -> dict[str, Any]:
    rows = _rows(bad.trial, draw, limits)
    limits = limits.replace(max_perplexity_increase=bad.limit)
    verdict = _judge(bad.trial, bad.trial.losses(bad.name)[rows], rows, limits)
    return {
        "model": bad.trial.name,
        "recipe": bad.name,
        "first_sequence": rows.start,
        "lower": bad.lower,
        **_document(verdict),
    }


def _equal_cases(
    trials: Sequence[Trial], kind: str, num_cases: int, limits: GateConfig
) -> list[dict[str, Any]]:
    copies = [copies_of(trial, kind, limits) for trial in trials[:num_cases]]
    found = []
    for number in range(num_cases):
        mine = copies[number % len(copies)]
        verdict = mine.verdict(number, _rows(mine.trial, number // len(copies), limits))
        case = {"model": mine.trial.name, "rewrite": number, **_document(verdict)}
        found.append(case | {key: verdict.numbers[key] for key in _OF_EQUAL})
    return found


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


def _rows(trial: Trial, draw: int, limits: GateConfig) -> slice:
    """Return which sequences a case reads; they lie in random order, so any in a row will do."""
    size = limits.eval_sequences
    start = draw % _num_draws(trial, limits) * size
    return slice(start, start + size)


def _num_draws(trial: Trial, limits: GateConfig) -> int:
    return len(trial.sequences) // limits.eval_sequences


def _document(verdict: Verdict) -> dict[str, Any]:
    numbers = verdict.numbers
    return {
        "passed": verdict.passed,
        "limit": numbers["max_perplexity_increase"],
        "increase": numbers["perplexity_increase"],
        "increase_upper95": numbers["perplexity_increase_upper95"],
        "reasons": list(verdict.reasons),
    }
