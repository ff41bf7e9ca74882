"""What text feeds every group of layers of an unchanged decoder, computed once and kept on disk.

Takes a decoder and token ids; gives the moments of its layers' inputs, read when asked for. They
lie in a folder named by the digest of all they depend on, so that whoever asks again for the same
model and text reads them. It does not know what is done with them.

O output features, I input features
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.errors import IntegrityError, StorageError
from cluster.locks import exclusive
from cluster.storage import (
    digest_file,
    library_storage_errors,
    read_manifest,
    staged_directory,
    storage_errors,
)
from jobs.compression.calibration import CalibrationPass, Scratch
from jobs.compression.inputs import LayerInputs
from jobs.compression.shared_inputs import HEAD, block_of, group_of, shared_inputs
from jobs.models.decoder import Decoder

_KIND = "statistics"
_FORMAT = 1  # part of the digest: another meaning of the files is another folder
_GRAM, _MEAN, _MAX, _COUNT = "gram_II", "mean_abs_I", "max_abs_I", "num_tokens"
_EFFECT = "effect_O"
_LONGEST_S = 24 * 3600.0
Progress = Callable[[int, int], None]


class DenseStatistics:
    """Moments of inputs and effects of outputs, in a folder.

    A file's digest is checked before it is read for the first time.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self._device = device
        self._recorded: Mapping[str, Mapping[str, str]] = read_manifest(folder)["files"]
        self._checked: set[str] = set()

    def observe(self, layers: Sequence[str]) -> dict[str, LayerInputs]:
        """Return what the text feeds these layers, of whatever block, or the head.

        Raises IntegrityError if a file is missing or damaged.
        """
        return {layer: self._inputs(layer) for layer in layers}

    def effects(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return how much each output of some layers of blocks changes what the block gives.

        See `CalibrationPass.effects`. Raises IntegrityError if a file is missing or damaged.
        """
        return {layer: self._read(layer, f"{layer}.{_EFFECT}")[0] for layer in layers}

    def advance(self) -> None:
        """Do nothing: every block's lie there."""

    def _inputs(self, layer: str) -> LayerInputs:
        group = group_of(layer)
        first = group.layers[0] if group else layer
        parts = (f"{first}.{part}" for part in (_GRAM, _MEAN, _MAX, _COUNT))
        gram_II, mean_abs_I, max_abs_I, count = self._read(layer, *parts)
        return LayerInputs(gram_II, mean_abs_I, max_abs_I, int(count))

    def _read(self, layer: str, *names: str) -> list[Tensor]:
        """Return tensors of the file that a layer's statistics are in."""
        path = self._path(_file_name(block_of(layer)))
        try:
            with safe_open(path, framework="pt") as file:
                return [file.get_tensor(name).to(self._device) for name in names]
        except (SafetensorError, OSError) as error:
            raise IntegrityError(self._damaged(path, str(error))) from None

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if name not in self._checked:
            if not path.is_file():
                raise IntegrityError(self._damaged(path, "it is missing"))
            with storage_errors(f"reading {path}"):
                found = digest_file(path)
            if found != self._recorded[name]["sha256"]:
                raise IntegrityError(self._damaged(path, "its SHA-256 differs from the manifest"))
            self._checked.add(name)
        return path

    def _damaged(self, path: Path, why: str) -> str:
        return f"{path} is damaged: {why}. Delete {self.folder} to compute it again."


@contextmanager
def dense_statistics(
    model: Decoder,
    tokens_NT: Tensor,
    cache: Path | None = None,
    progress: Progress = lambda done, total: None,
    scratch: Scratch | None = None,
) -> Iterator[DenseStatistics]:
    """Give what the text feeds the layers of a model as it is now.

    They are read from `cache` if they lie there, else computed, all blocks after one another, and
    written there; `progress` hears of blocks done, of how many. Without `cache` they lie in a
    temporary folder until the context ends. In memory is one block's at a time; `scratch` says
    where the text's states lie meanwhile.
    """
    device = model.model.embed_tokens.weight.device
    with ExitStack() as stack:
        if cache is None:
            where = None if scratch is None else scratch.folder
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where)))
        folder = cache / statistics_digest(model, tokens_NT)
        lock = cache / f"{folder.name}.lock"
        # Others that ask for the same wait for it: it may fill a disk once, not twice.
        with exclusive(lock, "a calibration", StorageError, timeout_s=_LONGEST_S):
            if not folder.is_dir():
                for leftover in cache.glob(f".{folder.name}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                _write(model, tokens_NT, folder, progress, scratch)
        yield DenseStatistics(folder, device)


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


def _write(
    model: Decoder, tokens_NT: Tensor, folder: Path, progress: Progress, scratch: Scratch | None
) -> None:
    num_blocks = model.config.num_layers
    with (
        staged_directory(folder, {"kind": _KIND}) as staging,
        CalibrationPass(model, tokens_NT, scratch) as text,
    ):
        for block in range(num_blocks):
            groups = shared_inputs(block)
            effects = text.effects([layer for group in groups for layer in group.layers])
            inputs = text.observe([group.layers[0] for group in groups], moves_on=True)
            _save(staging, _file_name(block), inputs, effects)
            progress(block + 1, num_blocks)
        _save(staging, _file_name(None), text.observe([HEAD]), {})


def _save(
    folder: Path, name: str, inputs: Mapping[str, LayerInputs], effects: Mapping[str, Tensor]
) -> None:
    tensors = {f"{layer}.{_EFFECT}": effect_O.cpu() for layer, effect_O in effects.items()}
    for layer, found in inputs.items():
        tensors[f"{layer}.{_GRAM}"] = found.gram_II.cpu()
        tensors[f"{layer}.{_MEAN}"] = found.mean_abs_I.cpu()
        tensors[f"{layer}.{_MAX}"] = found.max_abs_I.cpu()
        tensors[f"{layer}.{_COUNT}"] = torch.tensor(found.num_tokens)
    with library_storage_errors(f"writing {folder / name}", folder):
        save_file(tensors, folder / name)


def _file_name(block: int | None) -> str:
    """Return the file of a block, or of the head."""
    return "head.safetensors" if block is None else f"block-{block:05d}.safetensors"
