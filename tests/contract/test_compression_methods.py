"""What every compression method in jobs/compression/methods must offer."""

import inspect
from types import ModuleType

import pytest
import torch

from cluster.config import StrictModel
from jobs.compression import methods
from jobs.compression.inputs import InputSums, LayerInputs
from jobs.compression.methods._protocol import (
    CalibratedMethod,
    LayerResult,
    Method,
    Quantizable,
    Repair,
    RepairMethod,
    ScalingMethod,
    ShapingMethod,
    WeightMethod,
)
from jobs.compression.text import CalibrationText
from jobs.config import DecoderConfig
from jobs.kernels.formats import GROUPED, SCHEMES, Layout
from jobs.models.decoder import Decoder, build
from jobs.plugins import load_plugin, plugin_names

FORMATS: list[dict[str, object]] = [
    *({"scheme": scheme, "group_size": size} for scheme in GROUPED for size in (32, None)),
    *({"scheme": scheme} for scheme in SCHEMES if scheme not in GROUPED),
]
# Options that make a method do something; a new method adds its own line.
EXAMPLES: dict[str, list[dict[str, object]]] = {
    "awq": [{}, {"num_ratios": 3, "observer": "mse"}],
    "depth": [{"num_blocks": 1}, {"num_blocks": 2, "first": 1}],
    "distill": [
        {"num_tokens": 2000, "batch_size": 16, "seq_len": 12, "precision": "fp32"},
        {
            "num_tokens": 2000,
            "batch_size": 16,
            "seq_len": 12,
            "precision": "bf16",
            "schedule": "linear",
            "temperature": 2.0,
            "alpha": 0.1,
        },
    ],
    "gptq": [
        {**format_, "act_order": act_order} for format_ in FORMATS for act_order in (True, False)
    ],
    "magnitude": [{"sparsity": 0.0}, {"sparsity": 0.5}, {"pattern": "2:4"}],
    "rtn": [
        {**format_, "observer": observer} for format_ in FORMATS for observer in ("minmax", "mse")
    ],
    "smoothquant": [{}, {"strength": 0.8}],
    "sparsegpt": [{"sparsity": 0.0}, {"sparsity": 0.5}, {"pattern": "2:4"}],
    "width": [{"intermediate_size": 40}, {"num_kv_heads": 1}, {"hidden_size": 48}],
    "wanda": [{"sparsity": 0.0}, {"sparsity": 0.5}, {"pattern": "2:4"}],
}
CASES = [(name, options) for name in plugin_names(methods) for options in EXAMPLES.get(name, [])]
_SCALING, _SHAPING, _REPAIR = ("awq", "smoothquant"), ("depth", "width"), ("distill",)
LAYER_CASES = [(n, o) for n, o in CASES if n not in (*_SCALING, *_SHAPING, *_REPAIR)]
SCALING_CASES = [(n, o) for n, o in CASES if n in _SCALING]
SHAPING_CASES = [(n, o) for n, o in CASES if n in _SHAPING]
REPAIR_CASES = [(n, o) for n, o in CASES if n in _REPAIR]
CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2
)


def load(name: str) -> ModuleType:
    return load_plugin(methods, name, what="compression method")


def example_weight() -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(3)) * 0.02


def example_inputs(columns: int = 64) -> LayerInputs:
    """Inputs of unequal sizes that depend on each other; one is always zero."""
    draws = torch.Generator().manual_seed(4)
    mixed_NI = torch.randn(400, columns, generator=draws) @ torch.randn(
        columns, columns, generator=draws
    )
    sizes_I = torch.linspace(0.0, 3.0, columns).exp() - 1
    sums = InputSums(columns, torch.device("cpu"))
    sums.add(mixed_NI * sizes_I)
    return sums.moments()


def apply(method: ModuleType, weight_OI: torch.Tensor, options: object) -> LayerResult:
    if isinstance(method, CalibratedMethod):
        return method.apply_calibrated(weight_OI, example_inputs(weight_OI.shape[1]), options)
    assert isinstance(method, WeightMethod)
    return method.apply(weight_OI, options)


def scale(method: ModuleType, weights: list[torch.Tensor], options: object) -> torch.Tensor:
    assert isinstance(method, ScalingMethod)
    layers = [Quantizable(weight_OI, Layout("w4a16", 32)) for weight_OI in weights]
    return method.scale(layers, example_inputs(), torch.Tensor.clone, options)


@pytest.mark.parametrize("name", plugin_names(methods))
def test_method_when_imported_offers_documented_parts(name: str) -> None:
    method = load(name)
    assert isinstance(method, Method)
    parts = ("apply", "apply_calibrated", "scale", "cut", "repair")
    offered = [part for part in parts if hasattr(method, part)]
    assert len(offered) == 1
    assert inspect.getdoc(method)
    assert issubclass(method.Options, StrictModel)
    assert all(field.description for field in method.Options.model_fields.values())
    documented = (method.Options, method.layout, getattr(method, offered[0]))
    assert all(inspect.getdoc(part) for part in documented)
    assert EXAMPLES.get(name), f"add example options of {name} to this test"


@pytest.mark.parametrize(("name", "options"), LAYER_CASES)
def test_method_when_applied_gives_the_layout_it_promised(
    name: str, options: dict[str, object]
) -> None:
    method = load(name)
    parsed = method.Options.model_validate(options)
    result = apply(method, example_weight(), parsed)
    promised: Layout | None = method.layout(parsed)
    assert result.weight_OI.shape == (24, 64)
    assert result.weight_OI.dtype == torch.float32
    assert result.weight_OI.isfinite().all()
    if promised is None or promised.scheme == "bf16":
        assert result.quantized is None
    else:
        assert result.quantized is not None
        assert result.quantized.layout == promised
        assert torch.equal(result.weight_OI, result.quantized.dequantize())


@pytest.mark.parametrize(("name", "options"), LAYER_CASES)
def test_method_when_applied_leaves_its_input_and_repeats_itself(
    name: str, options: dict[str, object]
) -> None:
    method = load(name)
    parsed = method.Options.model_validate(options)
    weight_OI = example_weight()
    first = apply(method, weight_OI, parsed).weight_OI.clone()
    assert torch.equal(weight_OI, example_weight())
    assert torch.equal(apply(method, weight_OI, parsed).weight_OI, first)


@pytest.mark.parametrize(("name", "options"), LAYER_CASES)
def test_method_when_weight_is_zero_keeps_it(name: str, options: dict[str, object]) -> None:
    method = load(name)
    result = apply(method, torch.zeros(4, 64), method.Options.model_validate(options))
    assert torch.equal(result.weight_OI, torch.zeros(4, 64))


@pytest.mark.parametrize(("name", "options"), SCALING_CASES)
def test_scaling_method_gives_positive_factors_and_leaves_weights(
    name: str, options: dict[str, object]
) -> None:
    method = load(name)
    assert method.layout(method.Options()) is None
    weights = [example_weight(), torch.zeros(4, 64)]
    scale_I = scale(method, weights, method.Options.model_validate(options))
    assert scale_I.shape == (64,)
    assert scale_I.isfinite().all()
    assert (scale_I > 0).all()
    assert torch.equal(weights[0], example_weight())


@pytest.mark.parametrize(("name", "options"), SHAPING_CASES)
@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3"])
def test_shaping_method_gives_a_model_of_the_shape_it_promised_that_computes(
    name: str, options: dict[str, object], shape: str
) -> None:
    method = load(name)
    assert isinstance(method, ShapingMethod)
    parsed = method.Options.model_validate(options)
    assert method.layout(parsed) is None
    config = CONFIG.replace(shape=shape)
    model = build(config, seed=0)
    text_NT = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    method.cut(model, text_NT, parsed)
    promised = method.reshape(config, parsed)
    assert model.config == promised
    assert promised != config
    fresh = build(promised, seed=1)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(text_NT), fresh(text_NT))


def repaired(method: ModuleType, options: object) -> tuple[Decoder, list[float]]:
    """Return a decoder that lost weights and was repaired, and the losses on the way."""
    assert isinstance(method, RepairMethod)
    config = CONFIG.replace(initializer_range=0.1)
    student, losses = build(config, seed=0), []
    with torch.no_grad():
        for block in student.model.layers:
            block.mlp.up_proj.weight[:, ::2] = 0.0
            block.self_attn.v_proj.weight[:, 1::2] = 0.0
    text_NT = torch.randint(61, (200, 12), generator=torch.Generator().manual_seed(1))
    task = Repair(
        student,
        build(config, seed=0),
        CalibrationText.of(text_NT),
        frozenset(f"model.layers.{block}.mlp.up_proj" for block in range(CONFIG.num_layers)),
    )
    method.repair(task, options, lambda done, total, loss: losses.append(loss))
    return student, losses


@pytest.mark.parametrize(("name", "options"), REPAIR_CASES)
def test_repair_method_leaves_zeros_of_pruned_layers_lowers_the_loss_and_repeats_itself(
    name: str, options: dict[str, object]
) -> None:
    method = load(name)
    parsed = method.Options.model_validate(options)
    assert method.layout(parsed) is None
    need = method.text_need(parsed)
    assert 0 < need.num_sequences * need.seq_len <= parsed.num_tokens
    student, losses = repaired(method, parsed)
    assert losses[-1] < 0.95 * losses[0]
    assert student.config == CONFIG.replace(initializer_range=0.1)
    for block in student.model.layers:
        assert (block.mlp.up_proj.weight[:, ::2] == 0.0).all()
        assert (block.mlp.up_proj.weight[:, 1::2] != 0.0).all()
        assert (block.self_attn.v_proj.weight != 0.0).float().mean() > 0.9
    again, _ = repaired(method, parsed)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_pruning_method_when_a_pattern_is_given_keeps_so_many_of_every_group(name: str) -> None:
    method = load(name)
    result = apply(method, example_weight(), method.Options(pattern="2:4"))
    kept_OG = (result.weight_OI.unflatten(1, (-1, 4)) != 0).sum(dim=-1)
    assert (kept_OG == 2).all()


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5, "pattern": "2:4"}, {"pattern": "4:2"}])
def test_pruning_options_when_they_contradict_say_what_to_give(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"2:4"):
        load("wanda").Options.model_validate(options)


def test_magnitude_when_a_pattern_is_given_refuses_who_competes() -> None:
    with pytest.raises(ValueError, match=r"among=row .*pattern=2:4"):
        load("magnitude").Options(pattern="2:4", among="row")


@pytest.mark.parametrize(
    ("among", "expected"),
    [
        ("layer", [[0.0, -4.0, 0.0, 0.0], [10.0, 9.0, 0.0, -20.0]]),
        ("row", [[0.0, -4.0, 3.0, 0.0], [10.0, 0.0, 0.0, -20.0]]),
    ],
)
def test_magnitude_when_half_is_pruned_zeroes_the_smallest_of_the_layer_or_of_each_row(
    among: str, expected: list[list[float]]
) -> None:
    method = load("magnitude")
    weight_OI = torch.tensor([[1.0, -4.0, 3.0, -2.0], [10.0, 9.0, 0.2, -20.0]])
    result = method.apply(weight_OI, method.Options(sparsity=0.5, among=among))
    assert result.weight_OI.tolist() == expected
