"""What compression without any training costs: rounding of weights and activations, and pruning.

Takes trials of several models; gives increases of perplexity, and which share of the damage that
the plain method does a better one avoids, in perplexity: (plain - better) / (plain - dense).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.compression.contenders import BITS, DENSE, PATTERNS
from benchmarks.compression.estimates import (
    Claim,
    Estimate,
    Figure,
    at_least,
    at_most,
    estimate,
    increase,
    recovery,
)
from benchmarks.compression.trial import Trial

Section = dict[str, Any]
Found = tuple[Section, list[Claim]]

_LIMITS = {"int8_weight": 0.005, "w8a8": 0.02, "w8a8_smoothquant": 0.02}
_RECOVERY, _RECOVERY_LOWER = 0.55, 0.40
_REMOVED = 0.70
NOT_WORSE_MARGIN = 0.001  # of perplexity: what is worse by less is called equal
# Which weights compete with each other for the half that stays.
_PRUNING_GROUPS = {
    "unstructured": {
        "magnitude": "those of a layer",
        "magnitude_rows": "those of an output row",
        "wanda": "those of an output row",
        "sparsegpt": "those of 128 columns, all rows",
    },
    "2:4": dict.fromkeys(("magnitude", "wanda", "sparsegpt"), "4 consecutive inputs of a row"),
}


def eight_bits(trials: Sequence[Trial]) -> Found:
    """Return what int8 weights cost, alone and with int8 activations, plain and smoothed."""
    found = {name: _estimate(trials, [name, DENSE], increase(name, DENSE)) for name in _LIMITS}
    section = {name: _increase(each) for name, each in found.items()}
    versus = _versus(trials, "w8a8_smoothquant", "w8a8")
    section["w8a8_smoothquant"]["versus_w8a8"] = _not_worse_document(versus)
    claims = [at_most(f"{name}.upper", found[name].upper, limit) for name, limit in _LIMITS.items()]
    return section, [*claims, _not_worse("w8a8_smoothquant.versus_w8a8", versus)]


def few_bits(trials: Sequence[Trial]) -> Found:
    """Return the damage of rounding to 4 and 3 bits that GPTQ, AWQ and both avoid."""
    methods = ("gptq", "awq", "awq_gptq", "rtn")
    section: Section = {f"{method}_recovery": {} for method in methods}
    section["gptq_recovery_of_default_rtn"] = {}
    section["awq_gptq_versus"] = {}
    claims = []
    for bits in BITS:
        for method in methods:
            found = _recovery(trials, f"{method}-{bits}", f"naive-{bits}")
            section[f"{method}_recovery"][bits] = found.model_dump(mode="json")
            if method == "gptq":
                name = f"gptq_recovery.{bits}"
                claims.append(at_least(f"{name}.mean", found.mean, _RECOVERY))
                claims.append(at_least(f"{name}.lower", found.lower, _RECOVERY_LOWER))
        default = _recovery(trials, f"gptq-{bits}", f"rtn-{bits}")
        section["gptq_recovery_of_default_rtn"][bits] = default.model_dump(mode="json")
        section["awq_gptq_versus"][bits] = {}
        for alone in ("gptq", "awq"):
            versus = _versus(trials, f"awq_gptq-{bits}", f"{alone}-{bits}")
            section["awq_gptq_versus"][bits][alone] = _not_worse_document(versus)
            claims.append(_not_worse(f"awq_gptq_versus.{bits}.{alone}", versus))
    return section, claims


def pruning(trials: Sequence[Trial]) -> Found:
    """Return the damage of magnitude pruning that Wanda and SparseGPT avoid, at half the weights.

    `pruning_groups` says which weights each method compares with one another. Papers let magnitudes
    compete within a layer; `removed_of_rows` is beside those that compete within an output row.
    """
    section: Section = {}
    claims = []
    for pattern in PATTERNS:
        section[pattern] = {}
        for method in ("wanda", "sparsegpt"):
            found = _recovery(trials, f"{method}-{pattern}", f"magnitude-{pattern}")
            section[pattern][method] = found.model_dump(mode="json")
            claims.append(at_least(f"pruning.{pattern}.{method}.mean", found.mean, _REMOVED))
        versus = _versus(trials, f"sparsegpt-{pattern}", f"wanda-{pattern}")
        section[pattern]["sparsegpt_versus_wanda"] = _not_worse_document(versus)
        claims.append(_not_worse(f"pruning.{pattern}.sparsegpt_versus_wanda", versus))
    section["unstructured"]["removed_of_rows"] = {
        method: _recovery(
            trials, f"{method}-unstructured", "magnitude_rows-unstructured"
        ).model_dump(mode="json")
        for method in ("wanda", "sparsegpt")
    }
    return {"pruning": section, "pruning_groups": _PRUNING_GROUPS}, claims


def contenders(trials: Sequence[Trial]) -> Section:
    """Return perplexity, its increase and bytes of every contender that was computed so far."""
    names = [name for name in trials[0].known if all(name in trial.known for trial in trials)]
    base_bytes = trials[0].size_bytes(DENSE)
    found: Section = {}
    for name in names:
        perplexity = estimate([t.known for t in trials], _perplexity(name))
        found[name] = {
            "perplexity": perplexity.model_dump(mode="json"),
            "measured": sorted({trial.date(name) for trial in trials}),
        }
        if name != DENSE:
            found[name]["increase"] = _increase(
                estimate([t.known for t in trials], increase(name, DENSE))
            )
        size_bytes = trials[0].size_bytes(name)
        if size_bytes is not None and base_bytes is not None:
            found[name] |= {"weight_bytes": size_bytes, "size_ratio": size_bytes / base_bytes}
    return found


def _estimate(trials: Sequence[Trial], names: Sequence[str], figure: Figure) -> Estimate:
    return estimate([{name: t.losses(name) for name in names} for t in trials], figure)


def _recovery(trials: Sequence[Trial], method: str, naive: str) -> Estimate:
    return _estimate(trials, [method, naive, DENSE], recovery(method, naive, DENSE))


def _versus(trials: Sequence[Trial], name: str, other: str) -> Estimate:
    """Return the relative perplexity of a contender above another's; below 0 it is better."""
    return _estimate(trials, [name, other], increase(name, other))


def _not_worse(name: str, versus: Estimate) -> Claim:
    """Return the claim that a contender is shown to be no worse by more than the margin.

    A test of non-inferiority: noise widens the interval, and then the claim is missed.
    """
    return at_most(f"{name}.upper", versus.upper, NOT_WORSE_MARGIN)


def _not_worse_document(versus: Estimate) -> Section:
    return {**versus.model_dump(mode="json"), "margin": NOT_WORSE_MARGIN}


def _increase(found: Estimate) -> Section:
    """Return an increase as the gate names it: `point` with its bounds."""
    document = found.model_dump(mode="json")
    return {"point": document.pop("mean"), **document}


def _perplexity(name: str) -> Figure:
    return lambda means: np.exp(means[name])
