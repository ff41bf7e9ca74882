"""Linear layers that hold packed weights only and run on the operator chosen for them.

Takes a dense or quantized weight; gives a module that computes `x @ weight.T + bias`. It does not
know how operators work (see operators.py), nor which layer of a model it is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.kernels.formats import QuantizedWeight, Scheme
from jobs.kernels.operator import Operator, Problem
from jobs.kernels.operators import choose, find


class DenseLinear(nn.Module):
    """A linear layer with an unquantized weight, for inference."""

    scheme: Scheme = "bf16"
    operator = "dense"

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight_OI)
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] of x [..., I], in x's dtype."""
        return functional.linear(x, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight exists only in its operator's packed form."""

    def __init__(
        self, weight: QuantizedWeight, bias_O: Tensor | None, operator: Operator, problem: Problem
    ) -> None:
        super().__init__()
        self.scheme: Scheme = weight.scheme
        self.operator = operator.name
        self.bias: Tensor | None
        self.register_buffer("bias", bias_O)
        self._problem = problem
        self._run = operator.run
        # Not buffers: a change of type or device would break an operator's layout.
        self._packed = operator.pack(weight, problem)

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The operator's own tensors."""
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] of x [..., I], in x's dtype."""
        x_NI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y_NO = self._run(x_NI, self._packed, self.bias, self._problem)
        return y_NO if x.dim() == 2 else y_NO.reshape(*x.shape[:-1], -1)


def build_linear(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    operator: str | None = None,
) -> DenseLinear | QuantizedLinear:
    """Return a layer for weight_OI or its quantized form, on the fastest operator or a named one.

    `dtype` is that of activations, bias and a dense weight. Raises EngineError for an operator
    that does not exist or cannot run the layer.
    """
    device = torch.device(device)
    bias = None if bias is None else bias.detach().to(device, dtype)
    if isinstance(weight, Tensor):
        return DenseLinear(weight.detach().to(device, dtype), bias)
    shape = (weight.out_features, weight.in_features)
    if operator is None:
        operator = choose(weight.scheme, *shape, dtype, device, weight.group_size).operator
    problem = Problem(weight.layout, *shape, dtype, device)
    return QuantizedLinear(weight.to(device), bias, find(operator, problem), problem)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes that a model's weights occupy, shared ones counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            tensors.extend(module.packed)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
