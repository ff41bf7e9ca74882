"""The C++ products of linear layers: right at any shape, each row bitwise by itself, in place.

N rows, O outputs, I inputs
"""

import math
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import blocks, native
from jobs.kernels.formats import (
    Layout,
    QuantizedWeight,
    quantize_rows,
    reference_linear,
    round_to_scale,
    value_range,
)
from jobs.kernels.linear import DenseLinear, QuantizedLinear, build_linear, fuse, resident_bytes
from jobs.kernels.rows import QuantizedRows, padded_inputs, quantize

pytestmark = pytest.mark.skipif(
    not native.is_available(), reason=f"no kernels here: {native.why_unavailable()}"
)

Linear = DenseLinear | QuantizedLinear
Weight = Tensor | QuantizedWeight
LAYOUTS = [
    Layout("bf16"),
    Layout("w8a8"),
    Layout("w4a8", 32),
    Layout("w4a8", 64),
    Layout("w4a8", 96),
    Layout("w4a8", 128),
    Layout("w4a16", 8),
    Layout("w4a16", 32),
    Layout("w4a16", 128),
    Layout("w8a16", 4),
    Layout("w8a16", 32),
    Layout("w8a16", 128),
]
NAMES = [f"{layout.scheme}-{layout.group_size}" for layout in LAYOUTS]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight(rows: int, columns: int, layout: Layout, seed: int = 0) -> Weight:
    weight_OI = random(rows, columns, seed=seed) * 0.02
    if layout.scheme == "bf16":
        return weight_OI.to(torch.bfloat16)
    largest_OG = weight_OI.unflatten(1, (layout.num_groups(columns), -1)).abs().amax(dim=-1)
    return round_to_scale(weight_OI, largest_OG / value_range(layout.scheme)[1], layout)


def make_layer(weight: Weight, bias_O: Tensor | None = None) -> Linear:
    return build_linear(weight, bias_O, dtype=torch.float32, operator=blocks.NAME)


def expected(x_NI: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return reference_linear(x_NI, weight)
    return functional.linear(x_NI, weight.float())


def rows_for(layer: Linear, x_NI: Tensor) -> Tensor | QuantizedRows:
    return quantize(x_NI) if layer.takes_int8 else x_NI


def shapes_of(layout: Layout) -> list[tuple[int, int]]:
    if layout.group_size is not None:
        return [(rows, layout.group_size * groups) for rows, groups in ((7, 1), (33, 3), (100, 2))]
    return [(7, 5), (33, 64), (100, 67), (64, 256)]


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@every_layout
def test_product_when_shapes_are_odd_equals_the_reference(layout: Layout, threads: int) -> None:
    for rows, columns in shapes_of(layout):
        weight, bias_O = make_weight(rows, columns, layout), random(rows, seed=1)
        x_NI = random(29, columns, seed=2)
        y_NO = make_layer(weight, bias_O)(x_NI)
        wanted_NO = expected(x_NI, weight)
        error = (y_NO - bias_O - wanted_NO).abs().max() / wanted_NO.abs().max()
        assert float(error) <= 2e-6, f"{rows} x {columns}, {threads} threads"


@every_layout
def test_product_when_rows_are_computed_alone_is_bitwise_the_same(
    layout: Layout, threads: int
) -> None:
    rows, columns = shapes_of(layout)[-1]
    layer = make_layer(make_weight(rows, columns, layout))
    x_NI = random(161, columns, seed=2)
    whole_NO = layer(x_NI)
    for count in (*range(1, 41), 49, 64, 70, 97, 161):
        assert torch.equal(layer(x_NI[:count]), whole_NO[:count]), f"{count} rows"
        assert torch.equal(layer(x_NI[count - 1 : count]), whole_NO[count - 1 : count])


@every_layout
def test_product_when_threads_differ_is_bitwise_the_same(layout: Layout) -> None:
    rows, columns = shapes_of(layout)[-1]
    layer = make_layer(make_weight(rows, columns, layout))
    x_NI = random(17, columns, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer(x_NI))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_product_when_it_has_less_to_do_takes_no_longer() -> None:
    # A tile whose sums the compiler puts on the stack takes more than twice as long. With VNNI
    # int4 is unpacked on top of the same products; without, it has half as many.
    x_NI = quantize(random(12, 1024))
    layers = [make_layer(make_weight(64, 1024, Layout(*of))) for of in (("w8a8",), ("w4a8", 32))]
    y_NO = torch.empty(12, 64)
    shortest_s = [math.inf, math.inf]
    for _ in range(200):
        for place, layer in enumerate(layers):
            start_s = time.perf_counter()
            layer.multiply_into(x_NI, y_NO)
            shortest_s[place] = min(shortest_s[place], time.perf_counter() - start_s)
    less_s, more_s = shortest_s if native.instruction_set() == "avx512" else shortest_s[::-1]
    assert less_s <= 1.1 * more_s, f"{1e6 * less_s:.1f} us against {1e6 * more_s:.1f} us"


@every_layout
def test_product_when_accumulating_adds_to_what_is_there(layout: Layout) -> None:
    rows, columns = shapes_of(layout)[1]
    layer = make_layer(make_weight(rows, columns, layout), random(rows, seed=1))
    x_NI = random(13, columns, seed=2)
    wide_NO = random(13, rows + 9, seed=3)  # rows of y lie apart
    y_NO, before_NO = wide_NO[:, 4 : 4 + rows], wide_NO.clone()
    layer.multiply_into(rows_for(layer, x_NI), y_NO, accumulate=True)
    assert torch.equal(y_NO, before_NO[:, 4 : 4 + rows] + layer(x_NI))
    assert torch.equal(wide_NO[:, :4], before_NO[:, :4])
    assert torch.equal(wide_NO[:, 4 + rows :], before_NO[:, 4 + rows :])


@every_layout
def test_product_when_there_are_no_rows_gives_none(layout: Layout) -> None:
    rows, columns = shapes_of(layout)[1]
    assert make_layer(make_weight(rows, columns, layout))(torch.empty(0, columns)).shape == (
        0,
        rows,
    )


@every_layout
def test_fused_layers_when_run_give_bitwise_what_each_gives(layout: Layout) -> None:
    columns = shapes_of(layout)[1][1]
    biases = (random(64, seed=4), None, random(7, seed=5))
    layers = [
        make_layer(make_weight(rows, columns, layout, seed=rows), bias_O)
        for rows, bias_O in zip((64, 32, 7), biases, strict=True)
    ]
    fused = fuse(layers)
    assert fused is not None
    x_NI = random(5, columns, seed=2)
    assert torch.equal(fused(x_NI), torch.cat([layer(x_NI) for layer in layers], dim=1))


def test_layers_when_they_do_not_match_are_not_fused() -> None:
    int8 = make_layer(make_weight(32, 64, Layout("w8a8")))
    others = [
        make_layer(make_weight(32, 128, Layout("w8a8"))),
        make_layer(make_weight(32, 64, Layout("w4a8", 32))),
        make_layer(make_weight(32, 64, Layout("bf16"))),
    ]
    assert all(fuse([int8, other]) is None for other in others)
    assert fuse([make_layer(make_weight(33, 64, Layout("w8a8"))), int8]) is None
    by_torch = build_linear(random(32, 64), None, dtype=torch.float32)
    assert fuse([by_torch, by_torch]) is None


def test_layer_when_large_begins_with_a_large_page_and_counts_only_itself() -> None:
    layer = make_layer(make_weight(2048, 1024, Layout("bf16")))
    assert layer.packed[0].data_ptr() % (2 << 20) == 0
    assert resident_bytes(layer) == 2048 * 1024 * 2


def test_layer_when_not_ours_writes_in_place_too() -> None:
    weight_OI, x_NI = random(6, 4), random(3, 4, seed=1)
    layer = build_linear(weight_OI, None, dtype=torch.float32)
    y_NO = torch.ones(3, 6)
    layer.multiply_into(x_NI, y_NO, accumulate=True)
    assert torch.equal(y_NO, layer(x_NI) + 1)
    layer.multiply_into(x_NI, y_NO)
    assert torch.equal(y_NO, layer(x_NI))


@pytest.mark.parametrize("inputs", [1, 31, 64, 100])
def test_rows_when_quantized_equal_the_plain_format(inputs: int, threads: int) -> None:
    x_NI = random(19, inputs) * torch.logspace(-3, 3, 19)[:, None]
    x_NI[3] = 0
    rows = quantize(x_NI)
    values_NI, scale_N1 = quantize_rows(x_NI)
    assert rows.values_NS.shape == (19, padded_inputs(inputs))
    assert torch.equal(rows.values_NS[:, :inputs], values_NI)
    assert int(rows.values_NS[:, inputs:].abs().sum()) == 0
    assert torch.equal(rows.scale_N, scale_N1[:, 0])
    sums_NB = rows.values_NS.unflatten(1, (-1, 32)).sum(dim=-1, dtype=torch.int32)
    assert torch.equal(rows.sums_NB, sums_NB), f"{threads} threads"


def test_rows_when_given_room_fill_it() -> None:
    room = QuantizedRows.empty(8, 40)
    filled = quantize(random(5, 40), room.first(5))
    assert filled.values_NS.data_ptr() == room.values_NS.data_ptr()
    assert torch.equal(filled.values_NS, quantize(random(5, 40)).values_NS)


@pytest.mark.parametrize("rows", [1, 4, 6, 12, 32])
@pytest.mark.parametrize(
    ("layout", "value"),
    [
        (Layout("w8a8"), 127),
        (Layout("w8a8"), -128),
        (Layout("w4a8", 32), 7),
        (Layout("w4a8", 128), -8),
    ],
)
def test_sums_when_weights_and_inputs_are_extreme_do_not_overflow(
    layout: Layout, value: int, rows: int
) -> None:
    # Every product is the largest there is, with the weights' offset: 255 or 15 times 127.
    groups = layout.num_groups(8192)
    values_OI = torch.full((32, 8192), value, dtype=torch.int8)
    scale_OG = torch.ones(32, groups)
    layer = make_layer(QuantizedWeight(layout.scheme, values_OI, scale_OG, layout.group_size))
    for sign in (1, -1):
        y_NO = layer(torch.full((rows, 8192), sign * 127.0))
        assert torch.equal(y_NO, torch.full((rows, 32), sign * 127.0 * value * 8192))
