"""Whether formats are as small as they claim, on disk and in memory.

Takes formats of one large model; gives bytes of the weight files over theory (bits of a weight, a
16-bit scale a group, 16 bits for what is not quantized) and memory after loading over those bytes,
the worst of all formats. Memory is that of a process of its own.

Weights of 3 bits are computed as 4 bits, so their memory is that of 4: `w3_memory_ratio`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.compression.estimates import at_most
from benchmarks.compression.quality import Found
from benchmarks.serving.models import ROOT
from jobs.compression.layers import linear_shapes
from jobs.compression.recipe import layouts
from jobs.config import DecoderConfig, Recipe
from jobs.evaluation.compare import weight_file_bytes
from jobs.kernels.formats import PACKED_BITS, Scheme
from jobs.plan import count_parameters

_BITS: dict[Scheme, int] = {"bf16": 16, "w8a8": 8, "fp8": 8, **PACKED_BITS}
_DISK_LIMIT, _MEMORY_LIMIT = 1.05, 1.15
Resident = Callable[[Path], Mapping[str, Any]]


def resident(directory: Path) -> Mapping[str, Any]:
    """Return what a fresh process says of a model's memory."""
    command = [sys.executable, "-m", "benchmarks.compression.resident", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def theory_bytes(shape: DecoderConfig, recipe: Recipe) -> float:
    """Return the bytes that a recipe's formats need, without any header."""
    shapes, chosen = linear_shapes(shape), layouts(shape, recipe)
    total = 2.0 * count_parameters(shape)
    for name, layout in chosen.items():
        rows, columns = shapes[name]
        has_copy = name == "lm_head" and shape.tie_embeddings  # The embedding stays beside it.
        dense_bytes = 0 if has_copy else 2 * rows * columns
        scales = 0 if layout.scheme == "bf16" else rows * layout.num_groups(columns)
        total += rows * columns * _BITS[layout.scheme] / 8 + 2 * scales - dense_bytes
    return total


def measure(
    formats: Mapping[str, tuple[DecoderConfig, Recipe, Path]], measure_memory: Resident = resident
) -> Found:
    """Return every format's bytes and the worst ratios."""
    found = {}
    for name, (shape, recipe, path) in formats.items():
        file_bytes, memory = weight_file_bytes(path), measure_memory(path)
        theory = theory_bytes(shape, recipe)
        schemes = {layout.scheme for layout in layouts(shape, recipe).values()}
        found[name] = {
            "schemes": sorted(schemes),
            "theory_bytes": theory,
            "file_bytes": file_bytes,
            "disk_ratio": file_bytes / theory,
            **memory,
            "memory_ratio": memory["grown_bytes"] / file_bytes,
        }
    as_stored = [each["memory_ratio"] for each in found.values() if "w3a16" not in each["schemes"]]
    of_three = [each["memory_ratio"] for each in found.values() if "w3a16" in each["schemes"]]
    disk_ratio = max(each["disk_ratio"] for each in found.values())
    section = {
        "disk_ratio": disk_ratio,
        "memory_ratio": max(as_stored),
        "w3_memory_ratio": max(of_three, default=None),
        "formats": found,
    }
    claims = [
        at_most("true_size.disk_ratio", disk_ratio, _DISK_LIMIT),
        at_most("true_size.memory_ratio", max(as_stored), _MEMORY_LIMIT),
    ]
    return {"true_size": section}, claims
