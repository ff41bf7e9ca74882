"""Layers with packed weights: shapes, biases and what they keep in memory."""

import pytest
import torch
from torch import nn

from jobs.kernels.formats import Layout, reference_linear, round_to_scale
from jobs.kernels.linear import QuantizedLinear, build_linear, resident_bytes

GENERATOR_SEED = 5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(GENERATOR_SEED))


def test_dense_layer_when_called_equals_torch() -> None:
    weight_OI, bias_O, x_BTI = random(6, 4), random(6), random(2, 3, 4)
    layer = build_linear(weight_OI, bias_O, dtype=torch.float32)
    assert torch.equal(layer(x_BTI), nn.functional.linear(x_BTI, weight_OI, bias_O))
    assert (layer.scheme, layer.operator) == ("bf16", "dense")


@pytest.mark.parametrize("layout", [Layout("w8a8"), Layout("fp8"), Layout("w4a16", 64)])
def test_quantized_layer_when_given_bias_and_batch_keeps_shape_and_adds(layout: Layout) -> None:
    weight_OI, bias_O, x_BTI = random(96, 128), random(96), random(2, 3, 128)
    scale_OG = weight_OI.unflatten(1, (layout.num_groups(128), -1)).abs().amax(-1) / 7
    weight = round_to_scale(weight_OI, scale_OG, layout)
    y_BTO = build_linear(weight, bias_O, dtype=torch.float32)(x_BTI)
    expected_BTO = reference_linear(x_BTI.flatten(0, 1), weight).unflatten(0, (2, 3)) + bias_O
    assert y_BTO.shape == (2, 3, 96)
    assert float((y_BTO - expected_BTO).abs().max() / expected_BTO.abs().max()) <= 1e-2


@pytest.mark.parametrize(
    ("layout", "bits"), [(Layout("w8a8"), 8.5), (Layout("fp8"), 8.5), (Layout("w4a16", 128), 4.5)]
)
def test_quantized_layer_when_resident_is_as_small_as_its_format(
    layout: Layout, bits: float
) -> None:
    weight_OI = random(512, 512)
    scale_OG = weight_OI.unflatten(1, (layout.num_groups(512), -1)).abs().amax(-1) / 7
    layer = build_linear(round_to_scale(weight_OI, scale_OG, layout), None, dtype=torch.float32)
    assert isinstance(layer, QuantizedLinear)
    assert resident_bytes(layer) <= bits / 8 * 512 * 512


def test_resident_bytes_when_weights_are_shared_counts_them_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    assert resident_bytes(nn.ModuleList([first, second])) == 4 * 64
