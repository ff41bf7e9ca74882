"""How many tokens of heavy tenants a pass carries, on machines whose times are given."""

from collections.abc import Callable

import pytest
import torch
from engine_fakes import Clock

from jobs.config import DecoderConfig
from jobs.kernels.block_cache import BlockCache
from jobs.models.decoder import build
from serving.engines.native.sharing import CANDIDATES, measured_shared_tokens, shared_tokens


def found(seconds_of: Callable[[int], float], most_rows: int = 100) -> int:
    """Return what is found on a machine where a pass of so many rows takes so long."""
    clock = Clock()

    def run(rows: int) -> None:
        assert rows <= most_rows, "the cache has no block for it"
        clock.now_s += seconds_of(rows)

    return shared_tokens(run, most_rows, clock)


@pytest.mark.parametrize(
    ("per_row", "expected"), [(0.0, 8), (0.02, 8), (0.06, 3), (0.1, 1), (1.0, 1)]
)
def test_shared_tokens_when_rows_cost_more_are_fewer(per_row: float, expected: int):
    assert found(lambda rows: 0.01 * (1 + per_row * (rows - 1))) == expected


def test_shared_tokens_when_the_cache_is_small_ask_for_no_more_rows_than_it_has():
    assert found(lambda rows: 0.01, most_rows=6) == 3
    assert found(lambda rows: 0.01, most_rows=2) == 1


def test_shared_tokens_when_a_turn_is_disturbed_count_the_shortest():
    turns: dict[int, int] = {}

    def seconds_of(rows: int) -> float:
        turns[rows] = turns.get(rows, 0) + 1
        return 0.01 if turns[rows] == 3 else 0.05 * rows

    assert found(seconds_of) == 8


def test_shared_tokens_when_measured_on_a_model_are_one_of_the_candidates():
    shape = DecoderConfig(vocab_size=8, hidden_size=32, intermediate_size=64, num_layers=1)
    cache = BlockCache(shape, 16, 4, torch.float32)
    assert (
        measured_shared_tokens(build(shape, seed=1).eval(), cache, torch.device("cpu"))
        in CANDIDATES
    )
