"""AWQ: which factors it prefers, given what outputs matter and how a later step rounds."""

import torch
from torch import Tensor

from jobs.compression.blocks import BlockWork
from jobs.compression.calibration import CalibrationPass
from jobs.compression.inputs import InputSums, LayerInputs
from jobs.compression.methods import awq
from jobs.compression.methods._protocol import Quantizable
from jobs.compression.methods._rounding import Observer, find_scale
from jobs.compression.recipe import apply_recipe
from jobs.compression.steps import final_layouts, resolve
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig, Recipe, Step
from jobs.kernels.formats import Layout, round_to_scale
from jobs.models.decoder import build

INT4 = Layout("w4a16", 32)
CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2
)


def example_inputs() -> LayerInputs:
    """Inputs of very unequal sizes."""
    draws = torch.Generator().manual_seed(0)
    sums = InputSums(64, torch.device("cpu"))
    sums.add(torch.randn(500, 64, generator=draws) * torch.linspace(-2.0, 3.0, 64).exp())
    return sums.moments()


def example_weight(seed: int) -> Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))


def chosen(*layers: Quantizable) -> Tensor:
    return awq.scale(layers, example_inputs(), torch.Tensor.clone, awq.Options())


def error(weight_OI: Tensor, scale_I: Tensor, observer: Observer) -> float:
    scaled_OI = weight_OI * scale_I
    rounded = round_to_scale(scaled_OI, find_scale(scaled_OI, INT4, observer), INT4)
    difference_OI = rounded.dequantize() / scale_I - weight_OI
    return float(example_inputs().squared_error(difference_OI))


def test_scale_when_one_layers_outputs_matter_more_suits_that_layer() -> None:
    weights = [example_weight(1), example_weight(2) / torch.linspace(-2.0, 3.0, 64).exp()]
    ones_O, zeros_O = torch.ones(24), torch.zeros(24)
    for first, second in ((0, 1), (1, 0)):
        effects = {first: ones_O, second: zeros_O}
        suited_I = chosen(
            *(Quantizable(w, INT4, effect_O=effects[i]) for i, w in enumerate(weights))
        )
        effects = {first: zeros_O, second: ones_O}
        other_I = chosen(
            *(Quantizable(w, INT4, effect_O=effects[i]) for i, w in enumerate(weights))
        )
        assert error(weights[first], suited_I, "minmax") < error(weights[first], other_I, "minmax")


def test_squared_error_when_outputs_are_weighed_counts_each_by_its_weight() -> None:
    inputs, difference_OI = example_inputs(), example_weight(3)
    weight_O = torch.linspace(0, 2, 24)
    by_output = [float(inputs.squared_error(row[None])) for row in difference_OI]
    expected = sum(w * e for w, e in zip(weight_O.tolist(), by_output, strict=True))
    assert abs(float(inputs.squared_error(difference_OI, weight_O)) / expected - 1) < 1e-5


def test_effects_when_inputs_were_scaled_before_are_those_of_the_scaled_block() -> None:
    text_NT = torch.randint(61, (4, 40), generator=torch.Generator().manual_seed(4))
    steps = tuple(
        Step(method=method, options=options)
        for method, options in (("smoothquant", {}), ("awq", {"num_ratios": 1}), ("rtn", {}))
    )
    actions = resolve(Recipe(steps=steps), CONFIG)
    part = [name for name in actions[0].layers if ".layers.0." in name]
    found, expected = {}, {}
    for num_steps, effects in ((0, expected), (1, expected), (3, found)):
        work = BlockWork(build(CONFIG, seed=0), final_layouts(actions))
        with CalibrationPass(work.model, text_NT) as text:
            work.run(actions[:num_steps], part, text)
            effects[num_steps] = work.effects if num_steps == 3 else text.effects(part)
    value = "model.layers.0.self_attn.v_proj"
    assert torch.equal(found[3][value], expected[1][value])
    assert not torch.allclose(found[3][value], expected[0][value], rtol=0.01)


def test_scale_when_the_observer_is_unset_is_tried_as_the_later_step_rounds() -> None:
    text_NT = torch.randint(61, (4, 40), generator=torch.Generator().manual_seed(4))

    def weights(awq_options: dict[str, object], observer: str) -> Tensor:
        options = {"scheme": "w4a16", "group_size": 32, "observer": observer}
        steps = (Step(method="awq", options=awq_options), Step(method="rtn", options=options))
        model = apply_recipe(
            build(CONFIG, seed=0), Recipe(steps=steps), CalibrationText.of(text_NT)
        ).model
        return model.model.layers[0].mlp.gate_proj.weight

    for observer, other in (("minmax", "mse"), ("mse", "minmax")):
        unset = weights({}, observer)
        assert torch.equal(unset, weights({"observer": observer}, observer))
        assert not torch.equal(unset, weights({"observer": other}, observer))
