"""The sections of the compression benchmark: what each needs, and which keys it reports.

Takes a `Bench`; gives a part of the report and the claims it must keep. How a figure is taken
stands in the section's module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.compression import (
    gate,
    interop,
    large,
    parity,
    quality,
    size,
    speed,
    structured,
)
from benchmarks.compression.estimates import Claim, at_least, at_most
from benchmarks.compression.quality import Found, Section
from benchmarks.compression.subject import Subject, subjects
from benchmarks.compression.trial import Say, Trial

HELD_OUT_TOKENS = 200_000


@dataclass
class Bench:
    """What a section may use; models are trained, or found, when a section first needs them."""

    seeds: Sequence[int]
    steps: int
    num_sequences: int | None
    num_calibration: int
    rounds: int
    say: Say
    _subjects: list[Subject] = field(default_factory=list)
    _trials: list[Trial] = field(default_factory=list)

    @property
    def subjects(self) -> list[Subject]:
        """The models."""
        if not self._subjects:
            self._subjects = subjects(self.seeds, self.steps)
        return self._subjects

    @property
    def trials(self) -> list[Trial]:
        """A trial of every model, the same in all sections."""
        if not self._trials:
            self._trials = [
                Trial.open(each, self.num_sequences, self.num_calibration, self.say)
                for each in self.subjects
            ]
        return self._trials

    @property
    def has_trials(self) -> bool:
        """Whether any section has asked for models."""
        return bool(self._trials)

    def facts(self) -> Found:
        """Return what the models that sections asked for are, and how much text they read."""
        found: Section = {}
        claims = []
        if self._subjects:
            found["models"] = [each.document() for each in self._subjects]
        if self._trials:
            held_out = min(trial.num_held_out_tokens for trial in self._trials)
            found["held_out_tokens"] = held_out
            found["calibration_tokens"] = min(t.num_calibration_tokens for t in self._trials)
            claims.append(at_least("held_out_tokens", held_out, HELD_OUT_TOKENS))
        return found, claims


def _structured(bench: Bench) -> Found:
    plans = [structured.plan_of(each) for each in bench.subjects]
    return structured.measure(bench.trials, plans, bench.rounds)


def _parity(bench: Bench) -> Found:
    """Beside llmcompressor on the first model, in `.bench/llmcompressor`."""
    found = parity.measure_parity(
        bench.subjects[0],
        bench.rounds,
        num_sequences=bench.num_calibration,
        eval_sequences=bench.num_sequences,
    )
    claims: list[Claim] = []
    place = "parity_llmcompressor"
    for name, case in parity.CASES.items():
        method = found[name]
        ratio = method["perplexity"]["ours_over_theirs"]
        claims.append(at_most(f"{place}.{name}.perplexity", ratio, 1 + parity.TOLERANCE))
        seconds = method["seconds"]["ours_over_theirs"]
        claims.append(at_most(f"{place}.{name}.seconds", seconds, 1.0))
        if case.method == "wanda":
            agreement = method["mask_agreement"]
            claims.append(at_least(f"{place}.{name}.masks", agreement, parity.LEAST_AGREEMENT))
    claims.append(at_least(f"{place}.held_out_tokens", found["held_out_tokens"], HELD_OUT_TOKENS))
    for claim in interop.interop_claims(found["interop"]):
        claims.append(replace(claim, name=f"{place}.interop.{claim.name}"))
    return {place: found}, claims


def _true_size(bench: Bench) -> Found:
    return size.measure(
        {
            name: (large.SHAPE, recipe, large.directory(name))
            for name, recipe in large.FORMATS.items()
        }
    )


def _speed(bench: Bench) -> Found:
    names = dict.fromkeys(name for names in speed.BATCHES.values() for name in names)
    return speed.measure({name: large.directory(name) for name in names}, bench.rounds)


SECTIONS: dict[str, Callable[[Bench], Found]] = {
    "eight_bits": lambda bench: quality.eight_bits(bench.trials),
    "few_bits": lambda bench: quality.few_bits(bench.trials),
    "pruning": lambda bench: quality.pruning(bench.trials),
    "parity": _parity,
    "gate": lambda bench: gate.measure(bench.trials),
    "structured": _structured,
    "true_size": _true_size,
    "speed": _speed,
}
