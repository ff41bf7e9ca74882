"""How many tokens of heavy tenants a pass can carry without taking much longer: measured at start.

Takes a way to compute a pass of some rows; gives a number of tokens. It does not know tenants or
models: how far a pass is from its machine's limit at one row differs by a factor between machines.
"""

import math
import time
from collections.abc import Callable

import torch

from jobs.kernels.block_cache import BlockCache, BlockSpan
from serving.engines.native.runner import Model

# Beside the heavy tenants' tokens a pass has one of the light tenant, and as many more of theirs.
_LIGHT_ROWS = 2
CANDIDATES = (8, 5, 3, 2, 1)
_MOST_SLOWER = 1.25
_ROUNDS, _TIMING_S = 7, 0.5


def measured_shared_tokens(model: Model, cache: BlockCache, device: torch.device) -> int:
    """Return the most tokens of heavy tenants that make a light one's pass a quarter longer.

    The cache must not be in use yet: what is computed lies in its first blocks. On a GPU passes of
    a few rows take equally long, and nothing is measured.
    """
    if device.type != "cpu":
        return CANDIDATES[0]

    @torch.inference_mode()
    def run(rows: int) -> None:
        spans = [BlockSpan((block,), 0, 1) for block in range(rows)]
        tokens_1T = torch.arange(rows)[None] % model.config.vocab_size
        model.hidden(tokens_1T, torch.zeros_like(tokens_1T), cache.attention(spans))

    return shared_tokens(run, cache.num_blocks)


def shared_tokens(
    run: Callable[[int], None],
    most_rows: int,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return the most of `CANDIDATES` whose pass, of at most `most_rows`, is short enough.

    The shortest of some turns counts, since what others do on the machine only ever adds.
    """
    tokens = [each for each in CANDIDATES if each + _LIGHT_ROWS <= most_rows]
    if not tokens:
        return CANDIDATES[-1]
    shortest_s = dict.fromkeys((1, *(each + _LIGHT_ROWS for each in tokens)), math.inf)
    for rows in shortest_s:  # What is allocated and read for the first time is not timed.
        run(rows)
    end_s = clock() + _TIMING_S
    for number in range(_ROUNDS):
        if number > 1 and clock() >= end_s:
            break
        for rows in shortest_s:
            began_s = clock()
            run(rows)
            shortest_s[rows] = min(shortest_s[rows], clock() - began_s)
    limit_s = _MOST_SLOWER * shortest_s[1]
    within = (each for each in tokens if shortest_s[each + _LIGHT_ROWS] <= limit_s)
    return next(within, tokens[-1])
