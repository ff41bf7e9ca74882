"""What is broken about a model, whatever its perplexity says: values that are no numbers, zeros.

Takes a model directory, or a model and text; gives a sentence for each fault, with the layer's
name. It does not judge.

K sequences, T tokens, N = K * T, C hidden width, V vocabulary
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.compression import quantization_config
from jobs.kernels.formats import PACKED_BITS, unpack_values
from jobs.models import _hf, _weights
from jobs.models.decoder import Decoder

_VALUES_AT_ONCE = 2**24
_ROUNDING = 1e-4  # of the largest logit; sums in another order differ by less
_PACKED, _SHAPE = ".weight_packed", ".weight_shape"
_IN_BLOCK = re.compile(r"\.layers\.\d+\.")


def weight_faults(directory: Path, base: Path | None = None) -> list[str]:
    """Return what is wrong with the tensors of a model directory, dense or compressed.

    Weights, scales and biases must be finite, and neither a weight nor a scale all zero, unless it
    is so in the dense directory `base` that the model comes from (blocks that do nothing).
    """
    found, zeros = [], []
    for name, tensor in _plain_tensors(directory):
        if not _is_finite(tensor):
            found.append(f"`{name}` holds values that are not finite numbers")
        elif name.endswith((".weight", _PACKED, ".weight_scale")) and not _has_nonzero(tensor):
            zeros.append(name)
    if zeros and base is not None:
        known = {name for name, tensor in _weights.read_tensors(base) if not _has_nonzero(tensor)}
        depths = [_hf.read_config(each).get("num_hidden_layers") for each in (directory, base)]
        zeros = _new(zeros, known, is_same_depth=depths[0] == depths[1])
    return sorted([*found, *(f"`{name}` is all zeros" for name in zeros)])


def _plain_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor as stored, packed values as one a byte, by its name."""
    shapes = {  # Read first and alone: weights are held one at a time.
        name.removesuffix(_SHAPE): (int(tensor[0]), int(tensor[1]))
        for name, tensor in _weights.read_tensors(directory)
        if name.endswith(_SHAPE)
    }
    config = _hf.read_config(directory).get(quantization_config.KEY)
    layouts = {} if config is None else quantization_config.read_layouts(config, shapes)
    for name, tensor in _weights.read_tensors(directory):
        if name.endswith(_PACKED):
            layer = name.removesuffix(_PACKED)
            bits = PACKED_BITS[layouts[layer].scheme]
            tensor = unpack_values(tensor, shapes[layer][1], bits)
        yield name, tensor


def output_faults(
    model: Decoder, sequences_KT: NDArray[np.int64], base: Decoder | None = None
) -> list[str]:
    """Return what is wrong with what a model makes of text: the first layers and the logits.

    A layer whose outputs are not finite spoils all that follow, so only the first is named. One
    that gives only zeros in `base`, too, the model that this one comes from, is no fault. Logits
    are looked at in places all over the text, as many as fit into 64 MiB.
    """
    faults, logits_NV = _run(model, sequences_KT)
    if faults.zeros and base is not None:
        known = set(_run(base, sequences_KT)[0].zeros)
        is_same_depth = model.config.num_layers == base.config.num_layers
        faults.zeros = _new(faults.zeros, known, is_same_depth=is_same_depth)
    found = faults.sentences()
    if not torch.isfinite(logits_NV).all():
        return found or ["the logits are not finite numbers, though every layer's outputs are"]
    noise = _ROUNDING * float(logits_NV.abs().max())
    if float((logits_NV - logits_NV[:, :1]).abs().max()) <= noise:
        found.append("the logits are equal for all tokens: the model says nothing")
    elif float((logits_NV - logits_NV[:1]).abs().max()) <= noise:
        found.append("the logits do not depend on the text")
    return found


def _run(model: Decoder, sequences_KT: NDArray[np.int64]) -> tuple["_Faults", Tensor]:
    """Return what layers gave, and logits_NV in places all over the text."""
    faults = _Faults()
    rows_KT = torch.from_numpy(np.ascontiguousarray(sequences_KT))
    device = model.model.embed_tokens.weight.device
    with ExitStack() as hooks, torch.inference_mode():
        for name, module in _layers(model):
            hooks.callback(module.register_forward_hook(faults.hook(name)).remove)
        hidden_NC = model.hidden(rows_KT.to(device, torch.long)).flatten(0, 1)
        step = -(-len(hidden_NC) * model.config.vocab_size // _VALUES_AT_ONCE)
        return faults, model.head(hidden_NC[::step])


def _new(names: list[str], known: set[str], *, is_same_depth: bool) -> list[str]:
    """Return the names that are not known; blocks have other numbers where some were left out."""

    def place(name: str) -> str:
        name = name.replace(_PACKED, ".weight")
        return name if is_same_depth else _IN_BLOCK.sub(".layers.*.", name)

    places = {place(name) for name in known}
    return [name for name in names if place(name) not in places]


class _Faults:
    """What layers gave on the way through a model."""

    def __init__(self) -> None:
        self._not_finite: list[str] = []
        self.zeros: list[str] = []

    def hook(self, name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Tensor) -> None:
            if not _is_finite(output):
                self._not_finite.append(name)
            elif not _has_nonzero(output):
                self.zeros.append(name)

        return look

    def sentences(self) -> list[str]:
        not_finite = [f"`{name}` gives values that are not finite" for name in self._not_finite[:1]]
        return not_finite + [f"`{name}` gives nothing but zeros on text" for name in self.zeros]


def _layers(model: Decoder) -> Iterator[tuple[str, nn.Module]]:
    """Give the modules that hold weights: every leaf but the rotary positions."""
    for name, module in model.named_modules():
        if name and name != "rotary" and not any(module.children()):
            yield name, module


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in _parts(tensor))


def _has_nonzero(tensor: Tensor) -> bool:
    return any(bool(part.any()) for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor's values in pieces, those of 8-bit floats as float32."""
    for part in tensor.reshape(-1).split(_VALUES_AT_ONCE):
        is_small_float = part.is_floating_point() and part.element_size() == 1
        yield part.float() if is_small_float else part
