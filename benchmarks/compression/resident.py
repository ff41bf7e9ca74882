"""`python -m benchmarks.compression.resident DIRECTORY`: the memory that a loaded model holds.

Takes a model directory, in a process of its own; gives JSON: how much the process's own memory
(unique set size: pages that no other process maps) grew by loading it as the engine does, and the
bytes of its weights. What a mapping of the file keeps in memory is in the growth.
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from jobs.compression.packing import load_model
from jobs.kernels import native
from jobs.models._fused import FusedDecoder, can_fuse


def main(argv: Sequence[str] | None = None) -> int:
    """Load and print; return the exit code."""
    (directory,) = sys.argv[1:] if argv is None else argv
    native.is_available()  # Its library is not the model's.
    before_bytes = _own_bytes()
    loaded = load_model(Path(directory), verify=False)
    fused = FusedDecoder(loaded.model) if can_fuse(loaded.model) else None
    print(
        json.dumps(
            {
                "grown_bytes": _own_bytes() - before_bytes,
                "weight_bytes": loaded.weight_bytes,
                "operators": sorted(set(loaded.operators.values())),
                "is_one_call": fused is not None and fused.is_one_call,
            }
        )
    )
    return 0


def _own_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


if __name__ == "__main__":
    raise SystemExit(main())
