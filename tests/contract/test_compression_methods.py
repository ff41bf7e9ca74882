"""What every compression method in jobs/compression/methods must offer."""

import inspect
from types import ModuleType

import pytest
import torch

from cluster.config import StrictModel
from jobs.compression import methods
from jobs.compression.methods._protocol import LayerResult
from jobs.kernels.formats import SCHEMES, Layout
from jobs.plugins import load_plugin, plugin_names

# Options that make a method do something; a new method adds its own line.
EXAMPLES: dict[str, list[dict[str, object]]] = {
    "magnitude": [{"sparsity": 0.0}, {"sparsity": 0.5}],
    "rtn": [
        {"scheme": scheme, "group_size": 32, "observer": observer}
        for scheme in SCHEMES
        for observer in ("minmax", "mse")
    ],
}
CASES = [(name, options) for name in plugin_names(methods) for options in EXAMPLES.get(name, [])]


def load(name: str) -> ModuleType:
    return load_plugin(methods, name, what="compression method")


def example_weight() -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(3)) * 0.02


@pytest.mark.parametrize("name", plugin_names(methods))
def test_method_when_imported_offers_documented_parts(name: str) -> None:
    method = load(name)
    assert inspect.getdoc(method)
    assert issubclass(method.Options, StrictModel)
    assert all(field.description for field in method.Options.model_fields.values())
    assert all(inspect.getdoc(part) for part in (method.Options, method.layout, method.apply))
    assert EXAMPLES.get(name), f"add example options of {name} to this test"


@pytest.mark.parametrize(("name", "options"), CASES)
def test_method_when_applied_gives_the_layout_it_promised(
    name: str, options: dict[str, object]
) -> None:
    method = load(name)
    parsed = method.Options.model_validate(options)
    result: LayerResult = method.apply(example_weight(), parsed)
    promised: Layout | None = method.layout(parsed)
    assert result.weight_OI.shape == (24, 64)
    assert result.weight_OI.dtype == torch.float32
    if promised is None or promised.scheme == "bf16":
        assert result.quantized is None
    else:
        assert result.quantized is not None
        assert result.quantized.layout == promised
        assert torch.equal(result.weight_OI, result.quantized.dequantize())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_method_when_applied_leaves_its_input_and_repeats_itself(
    name: str, options: dict[str, object]
) -> None:
    method = load(name)
    parsed = method.Options.model_validate(options)
    weight_OI = example_weight()
    first = method.apply(weight_OI, parsed).weight_OI.clone()
    assert torch.equal(weight_OI, example_weight())
    assert torch.equal(method.apply(weight_OI, parsed).weight_OI, first)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_method_when_weight_is_zero_keeps_it(name: str, options: dict[str, object]) -> None:
    method = load(name)
    result = method.apply(torch.zeros(4, 64), method.Options.model_validate(options))
    assert torch.equal(result.weight_OI, torch.zeros(4, 64))


def test_magnitude_when_half_is_pruned_zeroes_the_smallest_of_each_row() -> None:
    method = load("magnitude")
    weight_OI = torch.tensor([[1.0, -4.0, 3.0, -2.0], [10.0, 0.5, 0.2, -20.0]])
    result = method.apply(weight_OI, method.Options(sparsity=0.5))
    assert result.weight_OI.tolist() == [[0.0, -4.0, 3.0, 0.0], [10.0, 0.0, 0.0, -20.0]]
