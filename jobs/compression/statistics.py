"""What text feeds every group of layers of an unchanged decoder, computed once and kept on disk.

Takes a decoder and token ids; gives the moments of its layers' inputs, read a block at a time. They
lie in a folder named by the digest of all they depend on, so that whoever asks again for the same
model and text reads them. It does not know what is done with them.

I input features
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.errors import IntegrityError, StorageError, VersionExistsError
from cluster.storage import (
    digest_file,
    library_storage_errors,
    read_manifest,
    staged_directory,
    storage_errors,
)
from jobs.compression.calibration import CalibrationPass
from jobs.compression.inputs import LayerInputs
from jobs.compression.shared_inputs import HEAD, block_of, group_of, shared_inputs
from jobs.models.decoder import Decoder

_KIND = "statistics"
_FORMAT = 1  # part of the digest: another meaning of the files is another folder
_GRAM, _MEAN, _MAX, _COUNT = "gram_II", "mean_abs_I", "max_abs_I", "num_tokens"
Progress = Callable[[int, int], None]


class DenseStatistics:
    """Moments of inputs by block, read when asked for; a context manager, as files may be its own.

    A file's digest is checked before it is read for the first time.
    """

    def __init__(self, folder: Path, device: torch.device, stack: ExitStack) -> None:
        self.folder = folder
        self._device, self._stack = device, stack
        manifest = read_manifest(folder)
        self.num_blocks = int(manifest["num_blocks"])
        self._recorded: Mapping[str, Mapping[str, str]] = manifest["files"]
        self._checked: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def block(self, number: int) -> dict[str, LayerInputs]:
        """Return the inputs of a block's groups by their first layers; after all blocks, the head.

        Raises IntegrityError if the file is missing or damaged.
        """
        assert 0 <= number <= self.num_blocks, f"block {number} of {self.num_blocks}"
        return {layer: self.layer(layer) for layer in _first_layers(number, self.num_blocks)}

    def layer(self, name: str) -> LayerInputs:
        """Return the inputs of the group that a layer of a block, or the head, belongs to."""
        group, block = group_of(name), block_of(name)
        first = group.layers[0] if group else name
        path = self._path(self.num_blocks if block is None else block)
        try:
            with safe_open(path, framework="pt") as file:
                gram_II, mean_abs_I, max_abs_I, count = (
                    file.get_tensor(f"{first}.{part}") for part in (_GRAM, _MEAN, _MAX, _COUNT)
                )
        except (SafetensorError, OSError) as error:
            raise IntegrityError(self._damaged(path, str(error))) from None
        return LayerInputs(gram_II, mean_abs_I, max_abs_I, int(count)).to(self._device)

    def _path(self, number: int) -> Path:
        path = self.folder / _file_name(number, self.num_blocks)
        if path.name not in self._checked:
            if not path.is_file():
                raise IntegrityError(self._damaged(path, "it is missing"))
            with storage_errors(f"reading {path}"):
                found = digest_file(path)
            if found != self._recorded[path.name]["sha256"]:
                raise IntegrityError(self._damaged(path, "its SHA-256 differs from the manifest"))
            self._checked.add(path.name)
        return path

    def _damaged(self, path: Path, why: str) -> str:
        return f"{path} is damaged: {why}. Delete {self.folder} to compute it again."


def dense_statistics(
    model: Decoder,
    tokens_NT: Tensor,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> DenseStatistics:
    """Return what the text feeds the layers of a model as it is now.

    They are read from `cache` if they lie there, else computed, all blocks after one another, and
    written there; `progress` hears of blocks done, of how many. Without `cache` they lie in a
    temporary folder until the context ends. In memory is one block's at a time.
    """
    device = model.model.embed_tokens.weight.device
    with ExitStack() as stack:
        if cache is None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = cache / statistics_digest(model, tokens_NT)
        if not folder.is_dir():
            _write(model, tokens_NT, folder, progress)
        return DenseStatistics(folder, device, stack.pop_all())
    raise AssertionError("an exit stack swallowed an exception")


def statistics_digest(model: Decoder, tokens_NT: Tensor) -> str:
    """Return the digest of all that statistics depend on: shape, weights and token ids."""
    digest = hashlib.sha256()
    description = {
        "format": _FORMAT,
        "config": model.config.model_dump(mode="json"),
        "tokens": list(tokens_NT.shape),
    }
    digest.update(json.dumps(description, sort_keys=True).encode())
    tensors = {**model.state_dict(), "tokens": tokens_NT.to(torch.int64)}
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole = tensor.detach().cpu().contiguous()
        digest.update(whole.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(model: Decoder, tokens_NT: Tensor, folder: Path, progress: Progress) -> None:
    num_blocks = model.config.num_layers
    manifest = {"kind": _KIND, "num_blocks": num_blocks}
    try:
        with (
            staged_directory(folder, manifest) as staging,
            CalibrationPass(model, tokens_NT, folder=folder.parent) as text,
        ):
            for number in range(num_blocks + 1):
                layers = _first_layers(number, num_blocks)
                found = text.observe(layers, moves_on=number < num_blocks)
                path = staging / _file_name(number, num_blocks)
                with library_storage_errors(f"writing {path}", staging):
                    save_file(_tensors(found), path)
                progress(number + 1, num_blocks + 1)
    except (VersionExistsError, StorageError):
        if not folder.is_dir():  # else another process has written the same meanwhile
            raise


def _tensors(found: Mapping[str, LayerInputs]) -> dict[str, Tensor]:
    tensors = {}
    for layer, inputs in found.items():
        tensors[f"{layer}.{_GRAM}"] = inputs.gram_II
        tensors[f"{layer}.{_MEAN}"] = inputs.mean_abs_I
        tensors[f"{layer}.{_MAX}"] = inputs.max_abs_I
        tensors[f"{layer}.{_COUNT}"] = torch.tensor(inputs.num_tokens)
    return tensors


def _first_layers(number: int, num_blocks: int) -> list[str]:
    """Return the first layers of a block's groups; the head is what comes after all blocks."""
    if number == num_blocks:
        return [HEAD]
    return [group.layers[0] for group in shared_inputs(number)]


def _file_name(number: int, num_blocks: int) -> str:
    return "head.safetensors" if number == num_blocks else f"block-{number:05d}.safetensors"
