"""What the transformers engine holds in memory; the contract has what it answers."""

import pytest
import torch
from engine_fakes import sequence

from serving.engines.native.passes import Piece
from serving.engines.native.sequence import State
from serving.engines.transformers import TransformersConfig
from serving.engines.transformers.adapters import Adapters
from serving.engines.transformers.loading import count_slots
from serving.engines.transformers.runner import TransformersRunner


@pytest.mark.parametrize(("num_blocks", "expected"), [(1000, 8), (100, 6), (16, 1)])
def test_count_slots_when_memory_is_short_allows_as_many_as_the_longest_fit(num_blocks, expected):
    config = TransformersConfig(max_slots=8)
    assert count_slots(config, num_blocks, max_len=256) == expected


class CountingRows:
    """Rows that say which sequences they were told to forget."""

    def __init__(self):
        self.forgotten = []

    def begin(self, key, tokens):
        return torch.zeros(1, 300)

    def forget(self, keys):
        self.forgotten += keys


def test_run_when_a_sequence_was_preempted_forgets_its_rows():
    rows = CountingRows()
    runner = TransformersRunner(rows, Adapters(torch.nn.Identity(), {}))
    each = sequence(4)
    each.move(State.WAITING)
    each.move(State.RUNNING)
    runner.run([Piece(each, 0, 4, is_last=True)])
    each.move(State.WAITING)
    runner.run([])
    assert rows.forgotten == [each]
