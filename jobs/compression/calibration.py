"""Calibration text on its way through a decoder, one block at a time.

Takes a decoder and token ids; gives what the text feeds the linear layers of the block it has
reached, and moves on through that block as it is by then: what was compressed before is what later
blocks see. In memory are one block's sums and one state a token, on disk beyond a limit. It does
not know what is done to the layers.

N sequences, T tokens, B sequences at a time, C hidden width
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from cluster.storage import GIB, storage_errors
from jobs.compression.inputs import InputSums, LayerInputs
from jobs.compression.shared_inputs import HEAD
from jobs.models.decoder import Decoder

_TOKENS_AT_ONCE = 4096
_MEMORY_BYTES = 2 * GIB
_TOKENS_FOR_EFFECTS = 8192


@dataclass(frozen=True)
class Scratch:
    """Where states lie that take more than `memory_bytes`; no folder: where the system puts it."""

    folder: Path | None = None
    memory_bytes: int = _MEMORY_BYTES


class CalibrationPass:
    """The text's hidden states before a block; a context manager, since they may lie on disk."""

    def __init__(self, model: Decoder, tokens_NT: Tensor, scratch: Scratch | None = None) -> None:
        """Embed the text. Raises StorageError where states go to a disk that is full."""
        assert tokens_NT.ndim == 2, f"expected [N, T] token ids, found {tuple(tokens_NT.shape)}"
        self._model, self._block = model, 0
        self._stack = ExitStack()
        self._device = model.model.embed_tokens.weight.device
        num_sequences, length = tokens_NT.shape
        self._batch = max(1, _TOKENS_AT_ONCE // length)
        shape = (num_sequences, length, model.config.hidden_size)
        self._states_NTC = self._allocate(shape, scratch or Scratch())
        positions_1T = torch.arange(length, device=self._device)[None]
        with torch.inference_mode():
            self._rotation = model.rotary(positions_1T, torch.float32)
            for rows, states_BTC in self._batches(tokens_NT):
                states_BTC.copy_(model.model.embed_tokens(rows.to(self._device, torch.long)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def observe(self, layers: Sequence[str], *, moves_on: bool = False) -> dict[str, LayerInputs]:
        """Return what the text feeds these layers of the block that it has reached, or the head.

        With `moves_on` it moves on through the block at once, as nothing will change there.
        """
        if self._block == len(self._model.model.layers):
            assert list(layers) == [HEAD], f"after all blocks comes the head, not {layers}"
            return {HEAD: self._observe_head()}
        with ExitStack() as hooks:
            sums = {layer: self._watch(layer, hooks) for layer in layers}
            for states_BTC, after_BTC in self._through():
                if moves_on:
                    states_BTC.copy_(after_BTC)
        self._block += moves_on
        return {layer: found.moments() for layer, found in sums.items()}

    def effects(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return how much each output of some layers changes what the block gives: effect_O.

        It is the mean over tokens of the squared derivative of the block's outputs, summed over
        them, from random signs (Hutchinson 1990) on the first tokens of the text.
        """
        signs = torch.Generator(self._device).manual_seed(0)
        found = {layer: torch.zeros(()) for layer in layers}
        num_tokens = 0
        for states_BTC in self._states_NTC.split(self._batch):
            if num_tokens >= _TOKENS_FOR_EFFECTS:
                break
            num_tokens += states_BTC.shape[0] * states_BTC.shape[1]
            for layer, slope_BTO in self._slopes(layers, states_BTC, signs).items():
                found[layer] = found[layer] + slope_BTO.square().flatten(0, 1).sum(dim=0)
        return {layer: sum_O / num_tokens for layer, sum_O in found.items()}

    def advance(self) -> None:
        """Move on through the block, as it is now."""
        for states_BTC, after_BTC in self._through():
            states_BTC.copy_(after_BTC)
        self._block += 1

    def _through(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the states before and after the block."""
        block = self._model.model.layers[self._block]
        with torch.inference_mode():
            for states_BTC in self._states_NTC.split(self._batch):
                yield states_BTC, block(states_BTC.to(self._device), *self._rotation)

    def _observe_head(self) -> LayerInputs:
        """Return the moments of the last norm's outputs; no logits are computed."""
        sums = InputSums(self._states_NTC.shape[2], self._device)
        with torch.inference_mode():
            for states_BTC in self._states_NTC.split(self._batch):
                h_BTC = self._model.model.norm(states_BTC.to(self._device))
                sums.add(h_BTC.flatten(0, 1))
        return sums.moments()

    def _slopes(
        self, layers: Sequence[str], states_BTC: Tensor, signs: torch.Generator
    ) -> dict[str, Tensor]:
        """Return derivatives of the block's outputs, summed with random signs, by layer."""
        block = self._model.model.layers[self._block]
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.enable_grad():
            for layer in layers:
                keep = partial(_keep, outputs, layer)
                hooks.callback(self._model.get_submodule(layer).register_forward_hook(keep).remove)
            # Copies, since what was made for inference does not take part in derivatives.
            h_BTC = states_BTC.to(self._device, copy=True).requires_grad_()
            after_BTC = block(h_BTC, *(angle.clone() for angle in self._rotation))
            shape, device = after_BTC.shape, self._device
            signs_BTC = torch.randint(0, 2, shape, generator=signs, device=device) * 2.0 - 1.0
            slopes = torch.autograd.grad(after_BTC, [outputs[name] for name in layers], signs_BTC)
        return dict(zip(layers, slopes, strict=True))

    def _watch(self, layer: str, hooks: ExitStack) -> InputSums:
        module = self._model.get_submodule(layer)
        assert isinstance(module, nn.Linear), f"{layer} is no dense layer"
        sums = InputSums(module.in_features, self._device)
        handle = module.register_forward_pre_hook(
            lambda _, inputs: sums.add(inputs[0].flatten(0, -2))
        )
        hooks.callback(handle.remove)
        return sums

    def _batches(self, tensor_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give rows of a tensor with the states of the same sequences."""
        return zip(tensor_N.split(self._batch), self._states_NTC.split(self._batch), strict=True)

    def _allocate(self, shape: tuple[int, int, int], scratch: Scratch) -> Tensor:
        num_values = shape[0] * shape[1] * shape[2]
        if 4 * num_values <= scratch.memory_bytes:
            return torch.empty(shape, device=self._device)
        where = scratch.folder or tempfile.gettempdir()
        with storage_errors(f"keeping {4 * num_values:,} bytes of states in {where}"):
            temporary = tempfile.TemporaryDirectory(dir=where)
            path = Path(self._stack.enter_context(temporary)) / "states"
            # A sparse file would end the process by SIGBUS when the disk fills up.
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, 4 * num_values)
            except OSError:
                self._stack.close()
                raise
        return torch.from_file(str(path), shared=True, size=num_values).view(shape)


def _keep(
    outputs: dict[str, Tensor], layer: str, module: nn.Module, inputs: object, output: Tensor
) -> None:
    outputs[layer] = output
