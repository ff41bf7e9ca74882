"""Optimal brain surgery, against least squares solved anew for every column."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cluster.errors import RecipeError
from jobs.compression.inputs import InputSums, LayerInputs
from jobs.compression.methods import gptq, rtn, sparsegpt, wanda
from jobs.compression.surgeon import operate

ROWS, COLUMNS = 12, 40
DAMPING = 0.02


class Settled:
    """A rule made of a function; keeps what it was shown of each block."""

    def __init__(self, settle: Callable[[int, Tensor], Tensor]) -> None:
        self._settle = settle
        self.entered: list[tuple[int, Tensor]] = []

    def enter(self, start: int, weight_OB: Tensor, diagonal_B: Tensor) -> None:
        self.entered.append((start, weight_OB.clone()))

    def settle(self, column: int, weight_O: Tensor) -> Tensor:
        return self._settle(column, weight_O)


def example() -> tuple[Tensor, LayerInputs]:
    draws = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(ROWS, COLUMNS, generator=draws)
    sums = InputSums(COLUMNS, torch.device("cpu"))
    sums.add(torch.randn(300, 8, generator=draws) @ torch.randn(8, COLUMNS, generator=draws))
    sums.add(torch.randn(300, COLUMNS, generator=draws))
    return weight_OI, sums.moments()


def reference(
    weight_OI: Tensor, gram_II: Tensor, settle: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Settle a column, then choose all later ones anew to err least, given those settled."""
    gram_II = gram_II.double()
    gram_II = gram_II + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II))
    wanted_OI, now_OI = weight_OI.double(), weight_OI.double().clone()
    for column in range(weight_OI.shape[1]):
        now_OI[:, column] = settle(column, now_OI[:, column].float())
        done, free = slice(0, column + 1), slice(column + 1, None)
        error_OD = now_OI[:, done] - wanted_OI[:, done]
        made_up_OF = torch.linalg.solve(gram_II[free, free], gram_II[free, done] @ error_OD.T).T
        now_OI[:, free] = wanted_OI[:, free] - made_up_OF
    return now_OI.float()


@pytest.mark.parametrize("block", [1, 7, 16, 64])
@pytest.mark.parametrize("kind", ["round", "zero"])
def test_operate_at_any_block_size_equals_least_squares_of_every_column(
    block: int, kind: str
) -> None:
    weight_OI, inputs = example()
    is_kept_OI = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) > 0.5

    def settle(column: int, weight_O: Tensor) -> Tensor:
        if kind == "zero":
            return weight_O * is_kept_OI[:, column]
        return (weight_O * 4).round() / 4

    found = operate(weight_OI, inputs.gram_II, Settled(settle), damping=DAMPING, block=block)
    expected = reference(weight_OI, inputs.gram_II, settle)
    # A value on the border between two steps may fall to either side.
    is_near = (found - expected).abs() < 1e-4
    assert is_near.float().mean() > (0.97 if kind == "round" else 0.9999)


def test_operate_when_a_block_begins_shows_weights_that_took_over_errors() -> None:
    weight_OI, inputs = example()
    rule = Settled(lambda column, weight_O: torch.zeros_like(weight_O))
    operate(weight_OI, inputs.gram_II, rule, damping=DAMPING, block=16)
    assert [start for start, _ in rule.entered] == [0, 16, 32]
    assert torch.equal(rule.entered[0][1], weight_OI[:, :16])
    assert not torch.equal(rule.entered[1][1], weight_OI[:, 16:32])


def test_operate_when_the_hessian_is_no_hessian_says_what_to_do() -> None:
    weight_OI, inputs = example()
    with pytest.raises(RecipeError, match=r"singular with damping=0\.01.*Raise `damping`"):
        operate(weight_OI, -inputs.gram_II, Settled(lambda _, w: w), damping=0.01)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("scheme", "group_size"), [("w4a16", 16), ("w4a8", 16), ("w8a8", None)])
def test_gptq_leaves_outputs_nearer_than_rounding_to_nearest(
    scheme: str, group_size: int | None, *, act_order: bool
) -> None:
    draws = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(32, 48, generator=draws)
    sums = InputSums(48, torch.device("cpu"))
    sums.add(torch.randn(500, 6, generator=draws) @ torch.randn(6, 48, generator=draws))
    sums.add(0.3 * torch.randn(500, 48, generator=draws))
    inputs = sums.moments()
    options = {"scheme": scheme} | ({"group_size": group_size} if group_size else {})
    nearest = rtn.apply(weight_OI, rtn.Options.model_validate(options))
    made_up = gptq.apply_calibrated(
        weight_OI, inputs, gptq.Options.model_validate({**options, "act_order": act_order})
    )
    error = inputs.squared_error(made_up.weight_OI - weight_OI)
    assert error < 0.6 * inputs.squared_error(nearest.weight_OI - weight_OI)


def test_gptq_when_weights_were_pruned_leaves_them_zero() -> None:
    weight_OI, inputs = example()
    pruned = wanda.apply_calibrated(weight_OI, inputs, wanda.Options(sparsity=0.5)).weight_OI
    for act_order in (True, False):
        options = gptq.Options(scheme="w4a16", group_size=16, act_order=act_order)
        padded = torch.nn.functional.pad(pruned, (0, 8))
        found = gptq.apply_calibrated(padded, _padded(inputs, 8), options).weight_OI
        assert (found[padded == 0] == 0).all()


def test_gptq_in_order_when_a_group_was_pruned_finds_its_scale_from_what_is_left() -> None:
    weight_OI, inputs = example()
    weight_OI = torch.nn.functional.pad(weight_OI, (0, 8))
    weight_OI[:, 16] *= 0.01
    weight_OI[:, 17:32] = 0.0
    options = gptq.Options(scheme="w4a16", group_size=16, act_order=False, observer="minmax")
    found = gptq.apply_calibrated(weight_OI, _padded(inputs, 8), options).quantized
    assert found is not None
    assert (found.values_OI[:, 16].abs() == 7).all()  # the only one left is its group's largest


def test_gptq_when_inputs_do_not_depend_on_each_other_is_rounding_to_nearest() -> None:
    weight_OI, _ = example()
    inputs = LayerInputs(torch.eye(COLUMNS), torch.ones(COLUMNS), torch.ones(COLUMNS), 1)
    options = {"scheme": "w8a8", "observer": "minmax"}
    found = gptq.apply_calibrated(weight_OI, inputs, gptq.Options.model_validate(options))
    assert torch.equal(
        found.weight_OI, rtn.apply(weight_OI, rtn.Options.model_validate(options)).weight_OI
    )


def test_wanda_zeroes_the_smallest_products_of_weight_and_input_in_each_row() -> None:
    weight_OI = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    gram_II = torch.diag(torch.tensor([100.0, 1.0, 1.0, 0.01]))
    inputs = LayerInputs(gram_II, torch.ones(4), torch.ones(4), 1)
    found = wanda.apply_calibrated(weight_OI, inputs, wanda.Options(sparsity=0.5))
    assert found.weight_OI.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_sparsegpt_leaves_outputs_nearer_than_wanda_at_the_same_sparsity() -> None:
    weight_OI, inputs = example()
    kept = sparsegpt.apply_calibrated(weight_OI, inputs, sparsegpt.Options(sparsity=0.5)).weight_OI
    zeroed = wanda.apply_calibrated(weight_OI, inputs, wanda.Options(sparsity=0.5)).weight_OI
    assert (kept == 0).float().mean() == 0.5
    error = inputs.squared_error(kept - weight_OI)
    assert error < 0.8 * inputs.squared_error(zeroed - weight_OI)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_sparsegpt_when_weights_are_zero_already_counts_them_as_pruned(
    options: dict[str, object], share: float
) -> None:
    weight_OI, inputs = example()
    if options == {"pattern": "2:4"} and share == 0.5:
        first = sparsegpt.Options(pattern="2:4")
    else:
        first = sparsegpt.Options(sparsity=share)
    once = sparsegpt.apply_calibrated(weight_OI, inputs, first).weight_OI
    parsed = sparsegpt.Options.model_validate(options)
    twice = sparsegpt.apply_calibrated(once, inputs, parsed).weight_OI
    assert (twice[once == 0] == 0).all()
    assert (twice != 0).sum() <= (once != 0).sum()
    if share == 0.5:
        assert torch.equal(twice, once)


def _padded(inputs: LayerInputs, more: int) -> LayerInputs:
    """Return the inputs with some that are always zero."""
    pad = torch.nn.functional.pad
    return LayerInputs(
        pad(inputs.gram_II, (0, more, 0, more)),
        pad(inputs.mean_abs_I, (0, more)),
        pad(inputs.max_abs_I, (0, more)),
        inputs.num_tokens,
    )
