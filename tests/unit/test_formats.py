"""Arithmetic on quantized formats against plain definitions and compressed-tensors' own code."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from jobs.kernels.formats import (
    Layout,
    QuantizedWeight,
    Scheme,
    pack_values,
    quantize_rows,
    quantize_rows_fp8,
    reference_linear,
    round_scale,
    round_to_scale,
    unpack_values,
    value_range,
)


def random_weight(rows: int, columns: int, layout: Layout) -> QuantizedWeight:
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    groups = layout.num_groups(columns)
    largest_OG = weight_OI.unflatten(1, (groups, -1)).abs().amax(dim=-1)
    return round_to_scale(weight_OI, largest_OG / value_range(layout.scheme)[1], layout)


@pytest.mark.parametrize("num_bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 13, 32, 128, 129])
def test_values_when_packed_equal_compressed_tensors_and_unpack(
    columns: int, num_bits: int
) -> None:
    generator = torch.Generator().manual_seed(columns)
    half = 1 << (num_bits - 1)
    values_OI = torch.randint(-half, half, (5, columns), dtype=torch.int8, generator=generator)
    packed_OW = pack_values(values_OI, num_bits)
    assert packed_OW.dtype == torch.int32
    assert torch.equal(packed_OW, pack_to_int32(values_OI, num_bits))
    assert torch.equal(unpack_values(packed_OW, columns, num_bits), values_OI)


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (192, 64), (96, 32), (40, 40)])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a8", "w3a16"])
def test_computable_when_scales_are_by_channel_gives_groups_that_operators_take(
    scheme: str, columns: int, size: int
) -> None:
    layout = Layout(scheme)  # type: ignore[arg-type]  # parametrized text
    weight_OI = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    weight = round_to_scale(weight_OI, weight_OI.abs().amax(dim=1, keepdim=True) / 7, layout)
    assert (weight.group_size, weight.scale_OG.shape) == (None, (5, 1))
    found = weight.computable()
    assert found.layout == Layout("w4a16" if scheme == "w3a16" else scheme, size)  # type: ignore[arg-type]  # parametrized text
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("layout", [Layout("w8a8"), Layout("w4a16", 16)])
def test_rounding_when_at_scale_errs_at_most_half_a_step(layout: Layout) -> None:
    weight_OI = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    weight = random_weight(6, 48, layout)
    step_OG1 = weight.scale_OG[:, :, None]
    error_OGS = (weight.dequantize() - weight_OI).unflatten(1, (step_OG1.shape[1], -1)).abs()
    # The stored scale is rounded to bfloat16, so the largest weight may be clipped a little.
    assert bool((error_OGS <= step_OG1 * 1.01).all())
    assert bool((error_OGS.mean(dim=-1, keepdim=True) <= 0.5 * step_OG1).all())


def test_rounding_when_values_exceed_the_range_clips() -> None:
    weight_OI = torch.tensor([[100.0, -100.0, 0.4, -0.6]])
    rounded = round_to_scale(weight_OI, torch.ones(1, 1), Layout("w4a16", 4))
    assert rounded.values_OI.tolist() == [[7, -8, 0, -1]]


def test_rounding_when_fp8_errs_at_most_half_a_step_of_three_mantissa_bits() -> None:
    weight_OI = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    weight = random_weight(6, 48, Layout("fp8"))
    smallest_O1 = weight.scale_OG * 2**-6  # Below the smallest normal number steps are equal.
    allowed_OI = torch.maximum(weight_OI.abs(), smallest_O1) * 2**-4
    error_OI = (weight.dequantize() - weight_OI).abs()
    # The stored scale is rounded to bfloat16, so the largest weight may be clipped a little.
    assert bool((error_OI <= allowed_OI * 1.01).all())
    assert float(weight.values_OI.float().abs().max()) == 448


def test_rounding_when_fp8_values_exceed_the_range_clips() -> None:
    rounded = round_to_scale(torch.tensor([[1e4, -1e4, 17.0]]), torch.ones(1, 1), Layout("fp8"))
    assert rounded.values_OI.float().tolist() == [[448, -448, 16]]


@pytest.mark.parametrize("largest", [1e-9, 3.3, 1e30])
def test_activations_when_fp8_fill_the_range_row_by_row(largest: float) -> None:
    x_NI = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    x_NI = x_NI / x_NI.abs().amax(dim=1, keepdim=True) * largest
    x_NI[5] = 0
    values_NI, scale_N1 = quantize_rows_fp8(x_NI)
    assert values_NI.dtype == torch.float8_e4m3fn
    assert bool(torch.isfinite(values_NI.float() * scale_N1).all())
    largest_N = values_NI.float().abs().amax(dim=1)
    assert largest_N[torch.arange(64) != 5].unique().tolist() == [448]
    assert not values_NI[5].float().any()


def test_activations_when_fp8_equal_compressed_tensors() -> None:
    x_NI = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    arguments = QuantizationArgs(
        num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True
    )
    values_NI, scale_N1 = quantize_rows_fp8(x_NI)
    theirs_BN1, zero_BN1 = compute_dynamic_scales_and_zp(x_NI[None], arguments, None)
    assert torch.equal(scale_N1, theirs_BN1[0])
    theirs_BNI = fake_quantize(x_NI[None], theirs_BN1, zero_BN1, arguments)
    assert torch.equal(values_NI.float() * scale_N1, theirs_BNI[0])


def test_scale_when_all_weights_are_zero_is_one() -> None:
    assert round_scale(torch.zeros(2, 1)).tolist() == [[1.0], [1.0]]


def test_activations_when_a_row_changes_leave_other_rows_alone() -> None:
    x_NI = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    values_NI, scale_N1 = quantize_rows(x_NI)
    x_NI[2] *= 1000
    changed_NI, changed_N1 = quantize_rows(x_NI)
    assert torch.equal(values_NI[:2], changed_NI[:2])
    assert torch.equal(scale_N1[:2], changed_N1[:2])
    assert values_NI.abs().amax(dim=1).tolist() == [127, 127, 127]


def test_activations_when_a_row_is_zero_stay_finite() -> None:
    values_NI, scale_N1 = quantize_rows(torch.zeros(1, 4))
    assert values_NI.tolist() == [[0, 0, 0, 0]]
    assert bool(torch.isfinite(scale_N1).all())


def test_reference_when_w4a16_is_the_dequantized_product() -> None:
    weight = random_weight(300, 64, Layout("w4a16", 32))
    x_NI = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        reference_linear(x_NI, weight), x_NI @ weight.dequantize().T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_reference_when_8_bit_is_the_product_of_rounded_activations(scheme: Scheme) -> None:
    weight = random_weight(300, 64, Layout(scheme))
    x_NI = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    values_NI, scale_N1 = (quantize_rows_fp8 if scheme == "fp8" else quantize_rows)(x_NI)
    expected_NO = (values_NI.float() * scale_N1) @ weight.dequantize().T
    torch.testing.assert_close(reference_linear(x_NI, weight), expected_NO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "expected_bytes"),
    [
        (Layout("bf16"), 2 * 10 * 256),
        (Layout("w8a8"), 10 * 256 + 2 * 10),
        (Layout("fp8"), 10 * 256 + 2 * 10),
        (Layout("w4a16", 128), 10 * 128 + 2 * 10 * 2 + 16),
    ],
)
def test_stored_bytes_when_counted_include_scales(layout: Layout, expected_bytes: int) -> None:
    assert layout.stored_bytes(10, 256) == expected_bytes


def test_weight_when_scales_do_not_fit_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="scales are"):
        QuantizedWeight("w8a8", torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2), None)
