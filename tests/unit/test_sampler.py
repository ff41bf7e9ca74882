import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.sampler import batch_indices


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(-(2**40), 2**40),
    num_sequences=st.integers(1, 300),
    batch_size=st.integers(1, 40),
)
def test_batches_over_an_epoch_visit_every_sequence_once(
    seed: int, num_sequences: int, batch_size: int
) -> None:
    num_steps = -(-2 * num_sequences // batch_size)
    stream = np.concatenate(
        [batch_indices(seed, step, batch_size, num_sequences) for step in range(num_steps)]
    )
    for epoch in range(2):
        part = stream[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(part.tolist()) == list(range(num_sequences))


def test_batch_of_a_step_is_the_same_whenever_asked() -> None:
    first = batch_indices(7, 123, 16, 1000)
    batch_indices(7, 5, 16, 1000)
    assert first.tolist() == batch_indices(7, 123, 16, 1000).tolist()


def test_batch_when_split_into_smaller_batches_is_the_same_stream() -> None:
    whole = batch_indices(1, 3, 16, 100)
    halves = [batch_indices(1, 6, 8, 100), batch_indices(1, 7, 8, 100)]
    assert whole.tolist() == np.concatenate(halves).tolist()


@pytest.mark.parametrize(("seed", "start"), [(1, 0), (0, 1000)])
def test_order_when_seed_or_epoch_differs_is_another(seed: int, start: int) -> None:
    base = batch_indices(0, 0, 1000, 1000)
    other = batch_indices(seed, start // 1000, 1000, 1000)
    assert np.mean(base == other) < 0.02


def test_order_looks_random_when_correlated_with_position() -> None:
    order = batch_indices(0, 0, 10_000, 10_000)
    correlation = np.corrcoef(order, np.arange(10_000))[0, 1]
    assert abs(correlation) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_order_is_fixed_for_ever_when_seed_is_given() -> None:
    # A resumed run must see the order of the version that began it.
    assert batch_indices(0, 0, 8, 100).tolist() == [25, 81, 21, 84, 88, 78, 65, 82]


def test_batch_when_corpus_is_huge_is_found_directly() -> None:
    indices = batch_indices(0, 10**6, 4, 10**12)
    assert len(set(indices.tolist())) == 4
    assert indices.max() < 10**12


def test_batch_when_step_is_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="step >= 0"):
        batch_indices(0, -1, 4, 10)
