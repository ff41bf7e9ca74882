"""Weights of model directories: safetensors files, in one piece or in shards with an index.

Takes and gives tensors by name. It does not know what a name means, nor a configuration.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from cluster.errors import ModelFormatError
from cluster.storage import library_storage_errors, storage_errors, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # Written by transformers before 4.32; it is recomputed.


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a model directory with its name, one shard in memory at a time.

    Raises ModelFormatError where weights are absent, unreadable or not as the index says.
    """
    for path, expected in _files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                if expected is not None and (missing := sorted(expected - set(names))):
                    raise ModelFormatError(f"{path} lacks `{missing[0]}`, which {INDEX} promises.")
                for name in names:
                    if not name.endswith(_IGNORED_SUFFIX):
                        yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFormatError(f"{path} is not a readable safetensors file: {error}") from None


def tensor_names(directory: Path) -> set[str]:
    """Return the names of all tensors of a model directory, without reading any.

    Raises ModelFormatError where weights are absent, unreadable or their index is damaged.
    """
    names: set[str] = set()
    for path, _ in _files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelFormatError(f"{path} is not a readable safetensors file: {error}") from None
    return names


def write_tensors(tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    """Write tensors to one file, or to several of at most `max_shard_bytes` and an index.

    A tensor larger than the limit has a file of its own. Raises StorageError, e.g. for a full disk.
    """
    with storage_errors(f"writing {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for file_name, shard in zip(names, shards, strict=True):
        path = directory / file_name
        whole = {name: tensor.contiguous() for name, tensor in shard.items()}
        with library_storage_errors(f"writing {path}", directory):
            save_file(whole, path, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: f for f, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Size], directory: Path
) -> None:
    """Raise ModelFormatError unless names and shapes are exactly the expected ones."""
    if missing := [name for name in expected if name not in found]:
        raise ModelFormatError(
            f"{directory} lacks the weights `{missing[0]}` ({len(missing)} of {len(expected)} are "
            "missing). The files do not belong to this config, or a shard is absent."
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise ModelFormatError(
            f"{directory} holds weights `{unknown[0]}` that its config has no place for "
            f"({len(unknown)} in all)."
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ModelFormatError(
                f"{directory}: `{name}` has shape {list(found[name].shape)}, and the config asks "
                f"for {list(shape)}."
            )


def _files(directory: Path) -> list[tuple[Path, set[str] | None]]:
    """Return the weight files, each with the names that an index promises in it."""
    if (directory / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((directory / INDEX).read_bytes())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(f"{directory / INDEX} is damaged: {error!r}") from None
        return [
            (_shard_path(directory, shard), {n for n, s in weight_map.items() if s == shard})
            for shard in shards
        ]
    if (directory / SINGLE).is_file():
        return [(directory / SINGLE, None)]
    raise ModelFormatError(
        f"{directory} has neither {SINGLE} nor {INDEX}. Other formats are not read: convert the "
        "weights to safetensors."
    )


def _shard_path(directory: Path, shard: str) -> Path:
    path = directory / shard
    if path.parent != directory or not path.is_file():
        raise ModelFormatError(
            f"{directory / INDEX} names the shard `{shard}`, which is not in the folder."
        )
    return path


def _shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size_bytes = 0
    items: Iterable[tuple[str, Tensor]] = tensors.items()
    for name, tensor in items:
        if shards[-1] and size_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = tensor
        size_bytes += tensor.nbytes
    return shards
