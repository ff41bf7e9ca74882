"""SmoothQuant: move large inputs' size into the weights, so that both round well to 8 bits.

Takes the weights of layers that share an input, and its moments; gives the factors by which the
input is divided. A later step quantizes the layers.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022, equation 4.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from cluster.config import StrictModel
from jobs.compression.inputs import LayerInputs
from jobs.compression.methods._protocol import Feasible, Quantizable
from jobs.kernels.formats import Layout

_LEAST = 1e-5
needs_effects = False


class Options(StrictModel):
    """How much of the inputs' spread the weights take over."""

    strength: float = Field(
        0.5, ge=0, le=1, description="0: the weights become even; 1: the inputs do."
    )


def layout(options: Options) -> Layout | None:
    """Return None: a later step quantizes."""
    return None


def scale(
    layers: Sequence[Quantizable], inputs: LayerInputs, feasible: Feasible, options: Options
) -> Tensor:
    """Return scale_I = max|x|^strength / max|w|^(1 - strength), over all layers' weights."""
    largest_I = torch.stack([layer.weight_OI.abs().amax(dim=0) for layer in layers]).amax(dim=0)
    inputs_I = inputs.max_abs_I.clamp_min(_LEAST)
    scale_I = inputs_I**options.strength / largest_I.clamp_min(_LEAST) ** (1 - options.strength)
    return feasible(torch.where(inputs.max_abs_I > 0, scale_I, 1.0).clamp_min(_LEAST))
