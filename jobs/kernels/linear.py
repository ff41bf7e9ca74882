"""Linear layers that hold packed weights only and run on the operator chosen for them.

Takes a dense or quantized weight; gives a module that computes `x @ weight.T + bias`. It does not
know how operators work (see operators.py), nor which layer of a model it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from jobs.kernels import blocks
from jobs.kernels.formats import Layout, QuantizedWeight, Scheme
from jobs.kernels.operator import Operator, Packed, Problem
from jobs.kernels.operators import choose, find
from jobs.kernels.rows import QuantizedRows


class _PackedLinear(nn.Module):
    """A linear layer whose weight exists only in its operator's packed form."""

    def __init__(
        self, packed: Packed, bias_O: Tensor | None, operator: Operator, problem: Problem
    ) -> None:
        super().__init__()
        self.scheme: Scheme = operator.scheme
        self.operator = operator.name
        self.source = operator
        self.problem = problem
        self.bias: Tensor | None
        self.register_buffer("bias", bias_O)
        # Not buffers: a change of type or device would break an operator's layout.
        self._packed = packed

    @property
    def packed(self) -> Packed:
        """The operator's own tensors."""
        return self._packed

    def share(self, packed: Packed) -> None:
        """Hold the same weights in memory that belongs to another layer too."""
        assert [t.shape for t in packed] == [t.shape for t in self._packed], "other weights"
        self._packed = packed

    @property
    def out_features(self) -> int:
        """Outputs of a row."""
        return self.problem.out_features

    @property
    def in_features(self) -> int:
        """Inputs of a row."""
        return self.problem.in_features

    @property
    def takes_int8(self) -> bool:
        """Whether `multiply_into` takes QuantizedRows, else float32 rows."""
        in_place = self.source.in_place
        return in_place is not None and in_place.takes_int8

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] of x [..., I], in x's dtype."""
        x_NI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y_NO = self.source.run(x_NI, self._packed, self.bias, self.problem)
        return y_NO if x.dim() == 2 else y_NO.reshape(*x.shape[:-1], -1)

    def multiply_into(
        self, x: Tensor | QuantizedRows, y_NO: Tensor, *, accumulate: bool = False
    ) -> None:
        """Set float32 y to the layer's outputs for N rows, or add them to it.

        x is QuantizedRows where `takes_int8`, else a float32 tensor [N, I]. Rows of either may lie
        apart, their values side by side. Results are bitwise those of `forward`, before adding.
        """
        assert y_NO.dtype == torch.float32, f"y is {y_NO.dtype}, not float32"
        assert y_NO.stride(-1) == 1, "outputs of a row must lie side by side"
        assert y_NO.shape[1] == self.out_features, f"y is {tuple(y_NO.shape)}"
        in_place = self.source.in_place
        if in_place is not None:
            in_place.multiply(x, self._packed, self.bias, y_NO, self.problem, accumulate)
            return
        assert isinstance(x, Tensor), f"operator {self.operator} takes float rows"
        result_NO = self.source.run(x, self._packed, self.bias, self.problem)
        if accumulate:
            y_NO.add_(result_NO)
        else:
            y_NO.copy_(result_NO)


class DenseLinear(_PackedLinear):
    """A linear layer with an unquantized weight, for inference."""


class QuantizedLinear(_PackedLinear):
    """A linear layer with a quantized weight."""


def build_linear(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    operator: str | None = None,
) -> DenseLinear | QuantizedLinear:
    """Return a layer for weight_OI or its quantized form, on the fastest operator or a named one.

    `dtype` is that of activations and bias. A dense weight that is bfloat16 may stay so; another
    is held in `dtype`. Raises EngineError for an operator that does not exist or cannot run the
    layer.
    """
    device = torch.device(device)
    bias = None if bias is None else bias.detach().to(device, dtype)
    if isinstance(weight, Tensor):
        layout, values_OI = Layout("bf16"), weight
        if weight.dtype != torch.bfloat16:
            operator = operator or "dense"  # the others would round the weight
    else:
        weight = weight.computable()
        layout, values_OI = weight.layout, weight.values_OI
    shape = (values_OI.shape[0], values_OI.shape[1])
    if operator is None:
        operator = choose(layout.scheme, *shape, dtype, device, layout.group_size).operator
    problem = Problem(layout, *shape, dtype, device)
    found = find(operator, problem)
    if isinstance(weight, Tensor):
        return DenseLinear(found.pack(weight.detach().to(device), problem), bias, found, problem)
    return QuantizedLinear(found.pack(weight.to(device), problem), bias, found, problem)


def fuse(
    layers: Sequence[DenseLinear | QuantizedLinear],
) -> DenseLinear | QuantizedLinear | None:
    """Return one layer that computes all of these, outputs side by side in this order.

    Results are bitwise those of the layers apart, which go on working, on the joined one's memory.
    None where they cannot be joined: different formats, groups, inputs or operators, an operator
    whose packed form is its own secret, or a layer before the last whose outputs fill no whole
    blocks.
    """
    assert layers, "there is nothing to join"
    first = layers[0]
    kinds = {(layer.operator, replace(layer.problem, out_features=0)) for layer in layers}
    if len(kinds) > 1 or first.source.in_place is None:
        return None
    packed = blocks.join([x.packed for x in layers], [x.out_features for x in layers])
    if packed is None:
        return None
    for number, layer in enumerate(layers):
        layer.share(blocks.part([x.packed for x in layers], number, packed))
    bias_O = None
    if any(layer.bias is not None for layer in layers):
        bias_O = torch.cat(
            [torch.zeros(x.out_features) if x.bias is None else x.bias for x in layers]
        )
    problem = replace(first.problem, out_features=sum(x.out_features for x in layers))
    return type(first)(packed, bias_O, first.source, problem)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes that a model's weights occupy, shared ones counted once.

    The room that aligns a large one, of 2 MiB at most, is not written and not counted.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, _PackedLinear):
            tensors.extend(module.packed)
    spans: dict[int, tuple[int, int]] = {}
    for tensor in filter(Tensor.numel, tensors):
        start, key = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        first, stop = spans.get(key, (start, start))
        spans[key] = min(first, start), max(stop, start + tensor.nbytes)
    return sum(stop - first for first, stop in spans.values())
