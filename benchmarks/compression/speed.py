"""How much faster formats decode than bfloat16, on the engine's kernels.

Takes directories of one large model; gives tokens per second of each, behind 128 tokens a sequence,
measured in turns, and ratios of the medians. W4 is the faster one of the formats with weights of 4
bits, W4A16 and W4A8; both are reported, and `w4_format` says which it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.compression.estimates import at_least
from benchmarks.compression.quality import Found
from jobs.compression.packing import LoadedModel, load_model
from jobs.evaluation.latency import compare_latency

BASE = "dense"
LIMITS = {"w8a8_batch1": 1.7, "w4_batch1": 2.5, "w8a8_batch32": 2.0}
BATCHES: dict[int, tuple[str, ...]] = {
    1: (BASE, "w8a8", "w8a16-g128", "w4a16-g128", "w4a8-g128"),
    32: (BASE, "w8a8", "w8a16-g128", "w4a8-g128"),
}
_KEYS = {"w8a8": "w8a8", "w8a16-g128": "w8a16", "w4a16-g128": "w4a16", "w4a8-g128": "w4a8"}
_OF_FOUR_BITS = ("w4a16_batch1", "w4a8_batch1")
_CONTEXT = 128


def measure(
    directories: Mapping[str, Path],
    rounds: int,
    *,
    tokens: int = 16,
    batches: Mapping[int, Sequence[str]] = BATCHES,
) -> Found:
    """Return ratios by format and batch, and every contender's times."""
    loaded = {name: load_model(path, verify=False) for name, path in directories.items()}
    section: dict[str, Any] = {}
    times: dict[str, Any] = {}
    for batch, names in batches.items():
        measured = compare_latency(
            [loaded[name].model for name in names],
            batch=batch,
            context=_CONTEXT,
            tokens=tokens,
            repeats=rounds,
        )
        by_name = dict(zip(names, measured, strict=True))
        for name, latency in by_name.items():
            times[f"{name}_batch{batch}"] = {
                "tokens_per_s": 1e3 * batch / latency.p50_ms,
                **latency.model_dump(mode="json", exclude={"tokens_per_s"}),
            }
            if name != BASE:
                ratio = by_name[BASE].p50_ms / latency.p50_ms
                section[f"{_KEYS[name]}_batch{batch}"] = ratio
    if found := [key for key in _OF_FOUR_BITS if key in section]:
        best = max(found, key=lambda key: float(section[key]))
        section |= {"w4_batch1": section[best], "w4_format": best.removesuffix("_batch1")}
    section["threads"] = torch.get_num_threads()
    section["operators"] = {name: _operators(model) for name, model in loaded.items()}
    section["times"] = times
    claims = [
        at_least(f"speed.{key}", section[key], limit)
        for key, limit in LIMITS.items()
        if key in section
    ]
    return {"speed": section}, claims


def _operators(model: LoadedModel) -> list[str]:
    return sorted(
        {f"{model.schemes[layer]} {operator}" for layer, operator in model.operators.items()}
    )
