"""The `quantization_config` of a model's config.json, in the compressed-tensors scheme.

Takes the format of each layer, or the parsed document; gives the other. Strict: a format that the
kernels do not compute is refused by name, never ignored. It does not know about tensors.
Source: github.com/vllm-project/compressed-tensors, quantization/quant_config.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.errors import ModelFormatError
from jobs.config import KvCache
from jobs.kernels.formats import CHANNELED, PACKED_BITS, Layout, Scheme

KEY = "quantization_config"
_FORMATS: dict[Scheme, str] = {
    "w8a8": "int-quantized",
    "fp8": "float-quantized",
    "w8a16": "pack-quantized",
    "w4a16": "pack-quantized",
    "w4a8": "pack-quantized",
    "w3a16": "pack-quantized",
}
_PRESETS = {
    "W8A8": Layout("w8a8"),
    "FP8_DYNAMIC": Layout("fp8"),
    "W8A16": Layout("w8a16", 128),
    "W4A16": Layout("w4a16", 128),
    "W4A8": Layout("w4a8", 128),
}
_CLASS = "Linear"
_FLOAT_INPUTS: dict[int, Scheme] = {8: "w8a16", 4: "w4a16", 3: "w3a16"}  # by bits of a weight
_CACHE = "kv_cache_scheme"
_OBSERVERS = ("observer", "observer_kwargs")  # They tell how scales were found; ours are dynamic.
_8_BIT_PER_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def to_document(
    chosen: Mapping[str, Layout], dense: Iterable[str], int8_cache: int | None = None
) -> dict[str, Any]:
    """Return the document for quantized layers by name; `dense` are the linear layers left as is.

    Layers of one format form a group that names each of them; a model of one format targets the
    class `Linear`, as readers expect. `int8_cache` is the size of a head whose keys and values are
    cached in int8; None: they are not.
    """
    groups: dict[Layout, list[str]] = {}
    for name, layout in chosen.items():
        groups.setdefault(layout, []).append(name)
    assert groups or int8_cache, "a dense model has no quantization_config"
    formats = {_FORMATS[layout.scheme] for layout in groups} or {"dense"}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": _group(layout, [_CLASS] if len(groups) == 1 else names)
            for number, (layout, names) in enumerate(groups.items())
        },
        "ignore": list(dense),
        _CACHE: None if int8_cache is None else _int8_cache_scheme(int8_cache),
    }


def read_layouts(
    document: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Layout]:
    """Return the format of each quantized layer, of the linear layers given with their shapes.

    Raises ModelFormatError for another quantization method or a format that is not supported.
    """
    method = document.get("quant_method")
    if method != "compressed-tensors":
        raise ModelFormatError(
            f"{KEY}: quant_method `{method}` is not supported; only `compressed-tensors` is. "
            "Quantize the dense model again, e.g. with `raysmith compress`."
        )
    if document.get("quantization_status", "compressed") != "compressed":
        raise ModelFormatError(
            f"{KEY}: quantization_status `{document['quantization_status']}` is not supported: the "
            "weights are not stored compressed. Save the model compressed."
        )
    if document.get("transform_config"):
        raise ModelFormatError(
            f"{KEY}: rotations of weights and activations (transform_config) are not supported. "
            "Compress the dense model without them."
        )
    sparsity = (document.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ModelFormatError(
            f"{KEY}: weights stored without their zeros (sparsity_config format `{sparsity}`) are "
            "not supported, only `dense`. Save the model with zeros in place."
        )
    found: dict[str, Layout] = {}
    ignored = document.get("ignore") or []
    for name in shapes:
        if not _matches(name, ignored):
            group = _group_of(name, document.get("config_groups") or {})
            if group is not None:
                found[name] = _layout(*group)
    return found


def read_kv_cache(document: Mapping[str, Any], head_dim: int) -> KvCache:
    """Return how keys and values, of heads of this size, are cached.

    Raises ModelFormatError for a scheme that is not ours: it is another rounding.
    """
    found: Mapping[str, Any] = document.get(_CACHE) or {}
    if not found:
        return "auto"
    wanted = _int8_cache_scheme(head_dim)
    rest = [value for option, value in found.items() if option not in (*wanted, *_OBSERVERS)]
    if any(rest) or any(found.get(option) != value for option, value in wanted.items()):
        raise ModelFormatError(
            f"{KEY}.{_CACHE}: {dict(found)} is not supported, only {wanted}: int8 with a scale for "
            f"each token and head of {head_dim} values. Remove it, or compress the dense model "
            "again with `kv_cache: int8`."
        )
    return "int8"


def refuse_kv_cache(document: Mapping[str, Any], why: str) -> None:
    """Raise ModelFormatError if a document quantizes keys and values at all."""
    if document.get(_CACHE):
        raise ModelFormatError(f"{KEY}.{_CACHE}: {document[_CACHE]} is not supported: {why}.")


def _int8_cache_scheme(head_dim: int) -> dict[str, Any]:
    """Return the scheme of a scale for each token and head.

    Keys and values are [B, heads, T, D] to compressed-tensors, which makes a scale of D values of
    `group`, but one of a head's T x D values of `token` (compute_dynamic_scales_and_zp).
    """
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": head_dim,
        "dynamic": True,
    }


def _group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    has_8_bit_inputs = layout.scheme not in _FLOAT_INPUTS.values()
    number = "float" if layout.scheme == "fp8" else "int"
    return {
        "targets": targets,
        "weights": {
            "num_bits": 8 if layout.scheme in CHANNELED else PACKED_BITS[layout.scheme],
            "type": number,
            "symmetric": True,
            "strategy": "channel" if layout.group_size is None else "group",
            "group_size": layout.group_size,
            "dynamic": False,
        },
        "input_activations": {**_8_BIT_PER_TOKEN, "type": number} if has_8_bit_inputs else None,
        "output_activations": None,
        "format": _FORMATS[layout.scheme],
    }


def _group_of(name: str, groups: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the group of a layer: one that names it, else one that targets its class."""
    by_class = None
    for key, group in groups.items():
        targets = group if isinstance(group, list) else group.get("targets") or []
        if _matches(name, [target for target in targets if target != _CLASS]):
            return key, group
        if _CLASS in targets and by_class is None:
            by_class = (key, group)
    return by_class


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(
        re.match(target.removeprefix("re:"), name) is not None
        if target.startswith("re:")
        else target in (name, _CLASS)
        for target in targets
    )


def _layout(key: str, group: Any) -> Layout:
    if isinstance(group, list):
        if key not in _PRESETS:
            raise ModelFormatError(
                f"{KEY}: scheme `{key}` is not supported; there are: {', '.join(_PRESETS)}."
            )
        return _PRESETS[key]
    layout = _layout_of(key, group.get("weights") or {}, group.get("input_activations"))
    _check_format(key, group, layout)
    return layout


def _layout_of(
    key: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None
) -> Layout:
    _check_weights(key, weights)
    strategy, num_bits = weights.get("strategy"), weights.get("num_bits")
    number = weights.get("type", "int")
    if num_bits == 8 and strategy == "channel" and _is_per_token(activations, number):
        return Layout("fp8" if number == "float" else "w8a8")
    if num_bits in _FLOAT_INPUTS and number == "int" and strategy in ("group", "channel"):
        group_size = weights["group_size"] if strategy == "group" else None
        if activations is None:
            return Layout(_FLOAT_INPUTS[num_bits], group_size)
        if num_bits == 4 and _is_per_token(activations, "int"):
            return Layout("w4a8", group_size)
    kind = "no quantized" if activations is None else _kind(activations)
    raise ModelFormatError(
        f"{KEY}.{key}: {_kind(weights)} weights by {strategy} with {kind} activations are not "
        "supported. There are: 8-bit by channel with dynamic 8-bit activations per token, both int "
        "(W8A8) or both float (FP8), 4-bit int by group or channel with unquantized "
        "activations (W4A16) or 8-bit int ones (W4A8), and 8-bit or 3-bit int with unquantized "
        "ones (W8A16, W3A16)."
    )


def _check_weights(key: str, weights: Mapping[str, Any]) -> None:
    wanted = {"symmetric": True, "dynamic": False, "actorder": None}
    for option, value in wanted.items():
        found = weights.get(option, value)
        # Static activation order is resolved in the stored weight; only `group` needs an index.
        if found != value and not (option == "actorder" and found in ("weight", "static", False)):
            raise ModelFormatError(
                f"{KEY}.{key}: weights with {option}={found!r} are not supported, only {value!r}."
            )


def _check_format(key: str, group: Mapping[str, Any], layout: Layout) -> None:
    if group.get("output_activations"):
        raise ModelFormatError(f"{KEY}.{key}: quantized outputs are not supported.")
    found, wanted = group.get("format"), _FORMATS[layout.scheme]
    if found not in (None, wanted):
        raise ModelFormatError(
            f"{KEY}.{key}: format `{found}` is not supported for {layout.scheme} weights, only "
            f"`{wanted}`. Save the model in that."
        )


def _is_per_token(activations: Mapping[str, Any] | None, number: str) -> bool:
    wanted = {**_8_BIT_PER_TOKEN, "type": number}
    return activations is not None and all(
        activations.get(option) == value for option, value in wanted.items()
    )


def _kind(arguments: Mapping[str, Any]) -> str:
    return f"{arguments.get('num_bits')}-bit {arguments.get('type', 'int')}"
