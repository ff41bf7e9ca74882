"""`python -m benchmarks.compression.resident DIRECTORY`: the memory that a loaded model holds.

Takes a model directory, in a process of its own; gives JSON: how much the process's own memory
(unique set size: pages that no other process maps) grew by loading it as the engine does, and the
bytes of its weights. What a mapping of the file keeps in memory is in the growth; what the first
model of any size costs a process (libraries, threads, some 70 MB) is not.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.compression.contenders import W8A8
from jobs.compression.packing import LoadedModel, load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import DecoderConfig
from jobs.models import decoder
from jobs.models._fused import FusedDecoder, can_fuse

_TINY = DecoderConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Load and print; return the exit code."""
    (directory,) = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory(prefix="raysmith-bench-") as folder:
        save_compressed(apply_recipe(decoder.build(_TINY, seed=0), W8A8), Path(folder))
        _load(Path(folder))
    before_bytes = _own_bytes()
    loaded, fused = _load(Path(directory))
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


def _load(directory: Path) -> tuple[LoadedModel, FusedDecoder | None]:
    loaded = load_model(directory, verify=False)
    return loaded, FusedDecoder(loaded.model) if can_fuse(loaded.model) else None


def _own_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


if __name__ == "__main__":
    raise SystemExit(main())
