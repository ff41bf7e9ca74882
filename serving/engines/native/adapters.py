"""LoRA adapters: read from PEFT directories, added to the rows of a pass that ask for them.

Takes directories; gives, for a pass, what the decoder calls after each linear layer. It does not
know about requests or how a layer computes.

T rows, C features in, O features out, R rank
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import ModelFormatError
from jobs.config import DecoderConfig
from jobs.kernels.low_rank import MAX_RANK, LowRank, add_low_rank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What tells PEFT how to train an adapter or where it came from, but does not change what it is.
# fmt: off
_NEUTRAL = frozenset({
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "r", "rank_pattern", "lora_alpha", "alpha_pattern",
    "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "lora_dropout", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
})
# fmt: on

_Layers = Mapping[str, LowRank]


class Adapters:
    """The adapters that one engine offers, by name."""

    def __init__(self, layers_by_name: Mapping[str, _Layers]) -> None:
        self._layers_by_name = dict(layers_by_name)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may ask for, in the order they were given."""
        return tuple(self._layers_by_name)

    def bytes(self) -> int:
        """Return the memory held, in bytes."""
        return sum(
            weight.bytes() for layers in self._layers_by_name.values() for weight in layers.values()
        )

    def batch(self, names: Sequence[str | None], lengths: Sequence[int]) -> "AdapterBatch | None":
        """Return what to add in a pass over parts of these lengths, or None for nothing.

        `names` are the adapters of the parts, None for the model as it is.
        """
        rows: dict[str, list[int]] = {}
        first = 0
        for name, length in zip(names, lengths, strict=True):
            if name is not None:
                rows.setdefault(name, []).extend(range(first, first + length))
            first += length
        if not rows:
            return None
        return AdapterBatch([(self._layers_by_name[name], where) for name, where in rows.items()])


class AdapterBatch:
    """The adapters of one pass, each with its rows; a `RowAdapters` of jobs.models.decoder."""

    def __init__(self, parts: Sequence[tuple[_Layers, Sequence[int]]]) -> None:
        self._parts = [
            (layers, torch.tensor(rows, dtype=torch.int32)) for layers, rows in parts if layers
        ]

    def add(self, layer_name: str, x_TC: Tensor, y_TO: Tensor) -> None:
        """Add to a layer's output, in place, what the rows' adapters make of its input."""
        for place, (layers, rows_N) in enumerate(self._parts):
            weight = layers.get(layer_name)
            if weight is None:
                continue
            if rows_N.device != x_TC.device:
                rows_N = rows_N.to(x_TC.device)
                self._parts[place] = (layers, rows_N)
            add_low_rank(x_TC, y_TO, rows_N, weight)


def load_adapters(
    directories: Mapping[str, str | Path], config: DecoderConfig, device: torch.device
) -> Adapters:
    """Read PEFT LoRA directories by the names that requests will use.

    Raises ModelFormatError for one that is not there, damaged, does not fit the model or uses what
    is not supported: every option that changes what a LoRA adapter computes is refused by name.
    """
    return Adapters({name: _load(Path(path), config, device) for name, path in directories.items()})


def _load(directory: Path, config: DecoderConfig, device: torch.device) -> dict[str, LowRank]:
    document = _read_config(directory)
    shapes = _layer_shapes(config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read_tensors(directory / WEIGHTS).items():
        layer, side = _parse(name, directory)
        if layer not in shapes:
            raise ModelFormatError(
                f"{directory}: `{name}` adapts `{layer}`; adapters of the linear layers within "
                f"blocks are supported, and this model has {config.num_layers} blocks."
            )
        pairs.setdefault(layer, {})[side] = tensor
    for layer, pair in pairs.items():
        _check_pair(directory, layer, pair, shapes[layer])
    return {
        layer: LowRank.create(pair["A"], pair["B"], _scale(document, layer, len(pair["A"]))).to(
            device
        )
        for layer, pair in pairs.items()
    }


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFormatError(
            f"{path} cannot be read: {error}. Give a directory that PEFT's save_pretrained wrote."
        ) from error
    if not isinstance(document, dict) or document.get("peft_type") != "LORA":
        raise ModelFormatError(f"{path}: `peft_type` must be LORA; other kinds are not supported.")
    if document.get("bias", "none") == "none":
        document.pop("bias", None)
    unsupported = sorted(key for key, value in document.items() if key not in _NEUTRAL and value)
    if unsupported:
        key = unsupported[0]
        raise ModelFormatError(
            f"{path}: `{key}`={json.dumps(document[key])[:80]} is not supported. Train the adapter "
            "without it, or merge it into the model's weights."
        )
    if not isinstance(document.get("r"), int) or document.get("lora_alpha") is None:
        raise ModelFormatError(f"{path}: `r` and `lora_alpha` are needed.")
    return document


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(
            f"{path} cannot be read: {error}. Save the adapter with safe_serialization=True."
        ) from error


def _parse(name: str, directory: Path) -> tuple[str, str]:
    """Return which layer a tensor adapts and whether it is A (down) or B (up)."""
    match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
    if match is None:
        raise ModelFormatError(
            f"{directory / WEIGHTS}: `{name}` is no low-rank part of a linear layer."
        )
    return match[1], match[2]


def _check_pair(
    directory: Path, layer: str, pair: Mapping[str, Tensor], shape: tuple[int, int]
) -> None:
    out_features, in_features = shape
    rank = len(pair["A"]) if "A" in pair else 0
    found = {side: tuple(tensor.shape) for side, tensor in sorted(pair.items())}
    if found != {"A": (rank, in_features), "B": (out_features, rank)}:
        raise ModelFormatError(
            f"{directory}: the adapter of `{layer}` has shapes {found}; the layer takes "
            f"{in_features} features and gives {out_features}. It is of another model."
        )
    if rank > MAX_RANK:
        raise ModelFormatError(
            f"{directory}: the adapter of `{layer}` has rank {rank}; at most {MAX_RANK} is run. "
            "Merge it into the model's weights."
        )


def _scale(document: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return what PEFT multiplies x @ A.T @ B.T by (Hu et al. 2021; rsLoRA, Kalajdzievski 2023)."""
    alpha = document["lora_alpha"]
    for pattern, value in (document.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):  # As peft.utils.other.get_pattern_key.
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if document.get("use_rslora") else rank)


def _layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of every linear layer within the blocks."""
    hidden = config.hidden_size
    query_size = config.num_heads * config.resolved_head_dim
    key_size = config.num_kv_heads * config.resolved_head_dim
    attention = {
        "self_attn.q_proj": (query_size, hidden),
        "self_attn.k_proj": (key_size, hidden),
        "self_attn.v_proj": (key_size, hidden),
        "self_attn.o_proj": (hidden, query_size),
    }
    shapes: dict[str, tuple[int, int]] = {}
    for block, inner in enumerate(config.mlp_sizes):
        mlp = {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{block}.mlp.{name}": shape for name, shape in mlp.items()}
    return shapes
