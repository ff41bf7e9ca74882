"""Round to nearest: the weight decides alone, no data is seen.

Takes one dense weight; gives values of few bits at a scale per output channel (w8a8, fp8) or per
group of inputs (w8a16, w4a16, w4a8, w3a16). The scale is the largest weight's (`minmax`), or that
clipped by the ratio, out of a grid, that leaves the least sum of cubed errors in it (`mse`).
"""

import torch
from torch import Tensor

from jobs.compression.methods._protocol import LayerResult
from jobs.compression.methods._rounding import RoundingOptions, find_scale
from jobs.kernels.formats import Layout, round_to_scale


class Options(RoundingOptions):
    """Into which format, and how scales are chosen."""


def layout(options: Options) -> Layout | None:
    """Return the format these options choose."""
    return options.chosen_layout()


def apply(weight_OI: Tensor, options: Options) -> LayerResult:
    """Quantize one weight, or round it to bfloat16 for the scheme `bf16`."""
    chosen = options.chosen_layout()
    if chosen.scheme == "bf16":
        return LayerResult(weight_OI.to(torch.bfloat16).to(weight_OI.dtype))
    scale_OG = find_scale(weight_OI, chosen, options.observer)
    quantized = round_to_scale(weight_OI, scale_OG, chosen)
    return LayerResult(quantized.dequantize(weight_OI.dtype), quantized)
