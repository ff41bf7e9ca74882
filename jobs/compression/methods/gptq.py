"""GPTQ: round column by column, and let the columns still to come make up for each error.

Takes one dense weight and its inputs' moments; gives values of few bits, like rtn, that leave the
layer's outputs nearer to what they were. Weights that are exactly zero (pruned ones) stay zero.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022.

O output features, I input features, G groups of inputs that share a scale
"""

import torch
from pydantic import Field
from torch import Tensor

from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._rounding import Observer, RoundingOptions, find_scale
from jobs.compression.surgeon import BLOCK, operate
from jobs.kernels.formats import CHANNELED, Layout, QuantizedWeight, round_values_


class Options(RoundingOptions):
    """Into which format, and how errors are made up for."""

    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the Hessian's diagonal, over its mean."
    )
    act_order: bool = Field(
        True, description="Round the columns of the largest inputs first; scales stay as they were."
    )


def layout(options: Options) -> Layout | None:
    """Return the format these options choose."""
    return options.chosen_layout()


def apply_calibrated(weight_OI: Tensor, inputs: LayerInputs, options: Options) -> LayerResult:
    """Quantize one weight, or round it to bfloat16 for the scheme `bf16`."""
    chosen = options.chosen_layout()
    if chosen.scheme == "bf16":
        return LayerResult(weight_OI.to(torch.bfloat16).to(weight_OI.dtype))
    order_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    if options.act_order:
        order_I = inputs.gram_II.diagonal().argsort(descending=True, stable=True)
    rule = _Rounding(weight_OI, chosen, options.observer, order_I, in_order=not options.act_order)
    settled_OI = operate(
        weight_OI[:, order_I],
        inputs.gram_II[order_I][:, order_I],
        rule,
        damping=options.damping,
        block=max(BLOCK, chosen.group_size or 0),
    )
    del settled_OI  # The rule holds the integers that it stands for.
    values_OI = torch.empty_like(rule.values_OI).index_copy_(1, order_I, rule.values_OI)
    quantized = QuantizedWeight(
        chosen.scheme,
        values_OI.to(CHANNELED.get(chosen.scheme, torch.int8)),
        rule.scale_OG,
        chosen.group_size,
    )
    return LayerResult(quantized.dequantize(weight_OI.dtype), quantized)


class _Rounding:
    """Rounds columns to their group's scale.

    In order of the inputs, a group's scale is chosen when its first column comes, from weights that
    have taken over earlier errors; in another order all scales are those of the weight as it was.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        chosen: Layout,
        observer: Observer,
        order_I: Tensor,
        *,
        in_order: bool,
    ) -> None:
        self.scale_OG = find_scale(weight_OI, chosen, observer)
        self.values_OI = torch.empty_like(weight_OI)
        self._is_kept_OI = (weight_OI != 0)[:, order_I]
        self._chosen, self._observer = chosen, observer
        self._group_I = (order_I // (chosen.group_size or weight_OI.shape[1])).tolist()
        self._renews = in_order and chosen.group_size is not None
        self._start, self._weight_OB = 0, weight_OI[:, :0]

    def enter(self, start: int, weight_OB: Tensor, diagonal_B: Tensor) -> None:
        self._start, self._weight_OB = start, weight_OB

    def settle(self, column: int, weight_O: Tensor) -> Tensor:
        group, size = self._group_I[column], self._chosen.group_size
        if self._renews and size is not None and column % size == 0:
            place = column - self._start
            # Pruned weights took over errors as well, but none of that will be stored.
            weight_OS = self._weight_OB[:, place : place + size]
            weight_OS = weight_OS * self._is_kept_OI[:, column : column + size]
            self.scale_OG[:, group] = find_scale(weight_OS, self._chosen, self._observer)[:, 0]
        scale_O = self.scale_OG[:, group]
        value_O = round_values_(weight_O / scale_O, self._chosen.scheme)
        value_O.mul_(self._is_kept_OI[:, column])
        self.values_OI[:, column] = value_O
        return value_O * scale_O
