"""Every operator against the plain reference, and the choice among them.

Tolerances are errors over the largest output: 1e-5 where the arithmetic is exact up to float32
rounding, 1e-2 where activations or results are bfloat16.

N rows, O outputs, I inputs
"""

import pytest
import torch
from torch import Tensor

from cluster.errors import EngineError
from jobs.kernels import build, native, w8a8
from jobs.kernels.formats import (
    CHANNELED,
    Layout,
    QuantizedWeight,
    reference_linear,
    round_to_scale,
    value_range,
)
from jobs.kernels.linear import build_linear
from jobs.kernels.operator import Problem
from jobs.kernels.operators import available, choose, find

CASES = [
    (scheme, operator)
    for scheme in ("w8a8", "fp8", "w8a16", "w4a16", "w4a8")
    for operator in available(scheme, "cpu")
]
SHAPES = [(256, 256), (768, 256), (128, 384), (272, 128)]


def layout_of(scheme: str, group_size: int = 128) -> Layout:
    return Layout(scheme, None if scheme in CHANNELED else group_size)  # type: ignore[arg-type]  # parametrized text


def make_weight(rows: int, columns: int, layout: Layout, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator) * 0.02
    largest_OG = weight_OI.unflatten(1, (layout.num_groups(columns), -1)).abs().amax(dim=-1)
    return round_to_scale(weight_OI, largest_OG / value_range(layout.scheme)[1], layout)


def make_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def error_of(y_NO: Tensor, expected_NO: Tensor) -> float:
    return float((y_NO.float() - expected_NO).abs().max() / expected_NO.abs().max())


@pytest.mark.parametrize(("scheme", "operator"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_when_run_equals_the_reference(
    scheme: str, operator: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = make_weight(*shape, layout_of(scheme))
    layer = build_linear(weight, None, dtype=dtype, operator=operator)
    is_exact = dtype == torch.float32 and operator != "int4pack"
    for rows in (1, 3, 40):
        x_NI = make_rows(rows, shape[1], dtype)
        y_NO = layer(x_NI)
        assert y_NO.dtype == dtype
        error = error_of(y_NO, reference_linear(x_NI.float(), weight))
        assert error <= (1e-5 if is_exact else 1e-2)


@pytest.mark.parametrize(("scheme", "operator"), CASES)
def test_operator_when_batch_grows_keeps_each_row(scheme: str, operator: str) -> None:
    layer = build_linear(
        make_weight(256, 256, layout_of(scheme)), None, dtype=torch.float32, operator=operator
    )
    x_NI = make_rows(48, 256, torch.float32)
    x_NI[5] *= 100
    whole_NO = layer(x_NI)
    for rows in (1, 2, 7, 33):
        for alone_O, beside_O in zip(layer(x_NI[:rows]), whole_NO[:rows], strict=True):
            assert error_of(alone_O, beside_O) <= 1e-6


@pytest.mark.parametrize(("scheme", "operator"), CASES)
def test_operator_when_weights_take_the_place_of_others_does_not_mix_them_up(
    scheme: str, operator: str
) -> None:
    # A library that caches by address would answer with the weights of a layer already freed.
    x_NI = make_rows(2, 256, torch.float32)
    for seed in range(6):
        weight = make_weight(512, 256, layout_of(scheme), seed)
        layer = build_linear(weight, None, dtype=torch.float32, operator=operator)
        assert error_of(layer(x_NI), reference_linear(x_NI, weight)) <= 1e-2
        del layer, weight


@pytest.mark.parametrize(("scheme", "operator"), CASES)
def test_operator_when_threads_change_after_packing_stays_right(scheme: str, operator: str) -> None:
    before = torch.get_num_threads()
    x_NI = make_rows(9, 256, torch.float32)
    weight = make_weight(768, 256, layout_of(scheme))
    try:
        torch.set_num_threads(1)
        layer = build_linear(weight, None, dtype=torch.float32, operator=operator)
        layer(x_NI)
        torch.set_num_threads(2)
        assert error_of(layer(x_NI), reference_linear(x_NI, weight)) <= 1e-2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w8a16", "w4a16", "w4a8"])
@pytest.mark.parametrize("shape", [(256, 256), (128, 4864), (1000, 256)])
def test_choice_when_made_is_right_for_its_shape(scheme: str, shape: tuple[int, int]) -> None:
    choice = choose(scheme, *shape, torch.float32)  # type: ignore[arg-type]  # parametrized text
    assert choice.operator in choice.microseconds
    assert "reference" not in choice.microseconds or len(choice.microseconds) == 1
    weight = make_weight(*shape, layout_of(scheme))
    x_NI = make_rows(4, shape[1], torch.float32)
    layer = build_linear(weight, None, dtype=torch.float32)
    assert layer.operator == choice.operator
    assert error_of(layer(x_NI), reference_linear(x_NI, weight)) <= 1e-2


def test_choice_when_asked_again_is_not_measured_again() -> None:
    first = choose("w8a8", 64, 64, torch.float32)
    assert choose("w8a8", 64, 64, torch.float32) is first


def test_choice_when_group_size_is_unusual_says_who_refused_and_why() -> None:
    choice = choose("w4a8", 64, 64, torch.float32, group_size=16)
    assert choice.operator == "reference"
    assert "multiples of 32, not 16" in choice.refused["cpp"]


def test_available_when_dense_lists_torch_last() -> None:
    assert available("bf16")[-1] == "dense"


def test_available_when_fp8_has_no_device_for_it_is_the_reference() -> None:
    assert available("fp8", "cpu") == ["reference"]
    problem = Problem(Layout("fp8"), 64, 64, torch.float32, torch.device("cpu"))
    with pytest.raises(EngineError, match="`scaled_mm` cannot run this layer: it runs on CUDA"):
        find("scaled_mm", problem)


def test_find_when_name_is_wrong_lists_the_right_ones() -> None:
    problem = Problem(Layout("w8a8"), 8, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(EngineError, match=r"no operator `zen` for w8a8; there are: .*reference"):
        find("zen", problem)


def test_find_when_operator_refuses_says_why() -> None:
    problem = Problem(Layout("w4a16", 16), 64, 64, torch.float32, torch.device("cpu"))
    with pytest.raises(EngineError, match="`int4pack` cannot run this layer: it takes groups of"):
        find("int4pack", problem)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w8a16", "w4a16"])
@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024)])
def test_operators_when_on_cuda_equal_the_reference(scheme: str, shape: tuple[int, int]) -> None:
    weight = make_weight(*shape, layout_of(scheme))
    for operator in available(scheme, "cuda"):  # type: ignore[arg-type]  # parametrized text
        layer = build_linear(weight, None, dtype=torch.bfloat16, device="cuda", operator=operator)
        for rows in (1, 5, 64):
            x_NI = make_rows(rows, shape[1], torch.bfloat16)
            y_NO = layer(x_NI.cuda()).cpu()
            assert error_of(y_NO, reference_linear(x_NI.float(), weight)) <= 1e-2, operator


@pytest.mark.skipif(not native.is_available(), reason=f"no kernels: {native.why_unavailable()}")
@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "w8a16", "w4a16", "w4a8"])
@pytest.mark.parametrize("out_features", [64, 1024])
def test_choose_when_an_operator_keeps_the_bits_of_rows_takes_such_a_one(
    scheme: str, out_features: int
) -> None:
    layout = Layout("bf16") if scheme == "bf16" else layout_of(scheme, 64)
    choice = choose(layout.scheme, out_features, 64, torch.float32, group_size=layout.group_size)
    problem = Problem(layout, out_features, 64, torch.float32, torch.device("cpu"))
    assert find(choice.operator, problem).has_exact_rows


def test_zentorch_when_the_cpu_lacks_avx512_is_refused_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(w8a8, "_load_zentorch", lambda: pytest.fail("it would die"))
    problem = Problem(Layout("w8a8", None), 64, 64, torch.float32, torch.device("cpu"))
    assert w8a8._refuses_zentorch(problem) == "this CPU lacks avx512f"
