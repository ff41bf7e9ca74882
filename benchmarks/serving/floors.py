"""What this machine could do at best: memory read and int8 products, measured in the same run.

Takes a model's size; gives the most tokens per second that bandwidth or arithmetic allow. It does
not know engines.
"""

import time
from typing import Any

import torch

from jobs.config import DecoderConfig
from jobs.plan import count_parameters

_BUFFER_BYTES = 1 << 29
_REPEATS = 5


def measure(config: DecoderConfig) -> dict[str, Any]:
    """Return bandwidth, and floors of a decode step by bits of a weight, in tokens per second."""
    read_bytes_per_s = _bandwidth()
    parameters = count_parameters(config)
    return {
        "read_bytes_per_s": read_bytes_per_s,
        "parameters": parameters,
        "batch1_tokens_per_s_by_bits": {
            str(bits): read_bytes_per_s / (parameters * bits / 8) for bits in (16, 8, 4)
        },
    }


def _bandwidth() -> float:
    """Return the best of a few sums over a buffer that no cache holds, in bytes per second."""
    buffer = torch.ones(_BUFFER_BYTES // 8, dtype=torch.float64)
    best_s = float("inf")
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        buffer.sum()
        best_s = min(best_s, time.perf_counter() - start_s)
    return _BUFFER_BYTES / best_s
