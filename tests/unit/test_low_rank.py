"""The low-rank part of a layer: equal to plain products, and the same for a row in any company."""

import pytest
import torch

from jobs.kernels import native
from jobs.kernels.low_rank import LowRank, add_low_rank


def random_layer(in_features: int, rank: int, out_features: int) -> tuple[LowRank, torch.Tensor]:
    """Return a low-rank pair and the dense matrix it stands for."""
    generator = torch.Generator().manual_seed(in_features + rank)
    a_RI = torch.randn(rank, in_features, generator=generator)
    b_OR = torch.randn(out_features, rank, generator=generator)
    return LowRank.create(a_RI, b_OR, 0.5), 0.5 * (b_OR.double() @ a_RI.double())


def added(x_TI, weight, rows, out_features) -> torch.Tensor:
    y_TO = torch.ones(x_TI.shape[0], out_features)
    add_low_rank(x_TI, y_TO, torch.tensor(rows, dtype=torch.int32), weight)
    return y_TO


@pytest.mark.parametrize(
    ("in_features", "rank", "out_features"), [(8, 1, 5), (33, 8, 64), (70, 16, 100), (64, 40, 17)]
)
def test_add_low_rank_for_any_shape_equals_the_dense_product(in_features, rank, out_features):
    weight, dense_OI = random_layer(in_features, rank, out_features)
    x_TI = torch.randn(11, in_features, generator=torch.Generator().manual_seed(0))
    rows = [0, 2, 3, 4, 7, 10]
    expected = torch.ones(11, out_features)
    expected[rows] += (x_TI[rows].double() @ dense_OI.T).float()
    torch.testing.assert_close(
        added(x_TI, weight, rows, out_features), expected, rtol=1e-5, atol=1e-4
    )


def test_add_low_rank_when_output_is_part_of_a_wider_row_changes_that_part_only():
    weight, dense_OI = random_layer(16, 4, 6)
    x_TI = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    wide = torch.zeros(3, 20)
    add_low_rank(x_TI, wide[:, 5:11], torch.arange(3, dtype=torch.int32), weight)
    torch.testing.assert_close(
        wide[:, 5:11], (x_TI.double() @ dense_OI.T).float(), rtol=1e-5, atol=1e-4
    )
    assert not wide[:, :5].any()
    assert not wide[:, 11:].any()


@pytest.mark.skipif(not native.is_available(), reason="no C++ kernels on this machine")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_add_low_rank_when_rows_stand_together_is_bitwise_the_same_as_alone(num_threads):
    weight, _ = random_layer(256, 16, 512)
    x_TI = torch.randn(39, 256, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    together = added(x_TI, weight, list(range(39)), 512)
    torch.set_num_threads(before)
    alone = torch.cat([added(x_TI[n : n + 1], weight, [0], 512) for n in range(39)])
    assert together.equal(alone)


def test_add_low_rank_when_activations_are_bfloat16_keeps_their_type():
    weight, dense_OI = random_layer(16, 4, 6)
    x_TI = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y_TO = torch.zeros(3, 6, dtype=torch.bfloat16)
    add_low_rank(x_TI, y_TO, torch.arange(3, dtype=torch.int32), weight)
    expected = (x_TI.double() @ dense_OI.T).float()
    torch.testing.assert_close(y_TO.float(), expected, rtol=0.02, atol=0.02)
