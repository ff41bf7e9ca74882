"""The linear layers of a model, by name: their shapes from a configuration, their weights.

Takes a model or its configuration; gives names, shapes and weights. It does not know formats.
"""

import torch
from torch import Tensor, nn

from jobs.compression.shared_inputs import HEAD
from jobs.config import DecoderConfig
from jobs.models import decoder, encoder
from jobs.models.decoder import Decoder
from jobs.models.encoder import Encoder, EncoderConfig

Shapes = dict[str, tuple[int, int]]


def linear_shapes(config: DecoderConfig | EncoderConfig) -> Shapes:
    """Return outputs and inputs of every linear layer, a decoder's head last."""
    return shapes_of(without_weights(config))


def shapes_of(model: Decoder | Encoder) -> Shapes:
    """Return the same of a model."""
    head = [HEAD] if isinstance(model, Decoder) else []
    shapes = {}
    for name in [*linear_names(model), *head]:
        rows, columns = weight_of(model, name).shape
        shapes[name] = (rows, columns)
    return shapes


def without_weights(config: DecoderConfig | EncoderConfig) -> Decoder | Encoder:
    """Return a model on the meta device."""
    with torch.device("meta"):
        return Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)


def linear_names(model: Decoder | Encoder) -> list[str]:
    """Return the names of all linear layers within the blocks, in order."""
    family = encoder if isinstance(model, Encoder) else decoder
    return family.linear_names(model)


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """Return a linear layer's weight itself, no copy."""
    module = model.get_submodule(layer)
    assert isinstance(module, nn.Linear), f"{layer} is {type(module).__name__}, not a dense layer"
    return module.weight
