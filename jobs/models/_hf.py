"""Hugging Face configuration files of decoders: config.json and generation_config.json.

Takes a DecoderConfig or a parsed config.json; gives the other. Strict both ways: what decoder.py
does not compute is refused by name, never ignored. It does not know about weights or torch.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.config import ModelT
from cluster.errors import ModelFormatError
from cluster.storage import write_json
from jobs.config import DecoderConfig, RopeScaling, Shape

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ARCHITECTURES: dict[Shape, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
_VARIED = "Raysmith"  # before the family's names: blocks differ in width
_SHAPES = {architecture: shape for shape, architecture in ARCHITECTURES.items()}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_COMPUTED_AS = {  # Options of these architectures with the one value that decoder.py computes.
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


def to_hf_config(config: DecoderConfig) -> dict[str, Any]:
    """Return the config.json of a decoder, which transformers 4 and 5 read alike.

    A decoder whose blocks differ in width has a type of its own, which transformers and vLLM do not
    know and refuse. Raises ModelFormatError where the family's own class has no room for the
    configuration.
    """
    _check_expressible(config)
    document: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.shape]],
        "model_type": config.shape,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.resolved_head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": _to_hf_scaling(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if config.intermediate_sizes is not None:
        # transformers has no class for it: an unknown type is refused there, not loaded wrongly.
        document["architectures"] = [_VARIED + ARCHITECTURES[config.shape]]
        document["model_type"] = f"{_VARIED.lower()}_{config.shape}"
        document["intermediate_sizes"] = list(config.intermediate_sizes)
    if config.shape in ("llama", "qwen3"):
        document["attention_bias"] = False
    if config.shape == "llama":
        document["mlp_bias"] = False
    if config.shape == "mistral":
        document["sliding_window"] = config.sliding_window
    if config.shape in ("qwen2", "qwen3"):
        document["sliding_window"] = config.sliding_window
        document["use_sliding_window"] = config.sliding_window is not None
        document["max_window_layers"] = 0 if config.sliding_window else config.num_layers
    return document


def from_hf_config(document: Mapping[str, Any]) -> DecoderConfig:
    """Return the decoder that a config.json describes; `quantization_config` is the caller's.

    Raises ModelFormatError for an architecture, rotary scaling or option that is not supported,
    and for values that are missing or out of bounds. Of several end tokens the first is kept, with
    a warning.
    """
    shape = _shape_of(document)
    if missing := [key for key in _REQUIRED if document.get(key) is None]:
        raise ModelFormatError(f"{CONFIG} lacks `{missing[0]}`, which a {shape} model needs.")
    rope = _rope_parameters(document)
    for key, computed in _COMPUTED_AS.items():
        found = rope.get(key, document.get(key, computed))
        if found is not None and found != computed:
            raise ModelFormatError(
                f"{CONFIG}: `{key}` = {found!r} is not supported; only {computed!r} is."
            )
    if dropout := document.get("attention_dropout"):
        warnings.warn(
            f"{CONFIG}: attention_dropout={dropout} is ignored: training has no dropout",
            stacklevel=2,
        )
    values = {
        "shape": shape,
        "vocab_size": document["vocab_size"],
        "hidden_size": document["hidden_size"],
        "intermediate_size": document["intermediate_size"],
        "intermediate_sizes": document.get("intermediate_sizes"),
        "num_layers": document["num_hidden_layers"],
        "num_heads": document["num_attention_heads"],
        "num_kv_heads": document.get("num_key_value_heads") or document["num_attention_heads"],
        "head_dim": _head_dim(shape, document),
        "max_seq_len": document.get("max_position_embeddings", 2048),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _from_hf_scaling(rope, document),
        "norm_eps": document.get("rms_norm_eps", 1e-6),
        "tie_embeddings": document.get("tie_word_embeddings", False),
        "sliding_window": _sliding_window(shape, document),
        "initializer_range": document.get("initializer_range", 0.02),
        "bos_token_id": document.get("bos_token_id"),
        "eos_token_id": _single_token(document.get("eos_token_id")),
    }
    return shape_from(DecoderConfig, values, what="model")


def shape_from(kind: type[ModelT], values: Mapping[str, Any], *, what: str) -> ModelT:
    """Return a model's shape from what its config.json says, or raise ModelFormatError."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelFormatError(
            f"{CONFIG} describes no {what} that can be built: {where} {first['msg']}"
        ) from None


def read_config(directory: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model directory; ModelFormatError if there is none."""
    path = directory / CONFIG
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelFormatError(
            f"{directory} is not a model directory: it has no {CONFIG}. Check the path."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ModelFormatError(f"{path} holds a {type(document).__name__}, not keys and values.")
    return document


def write_config(document: Mapping[str, Any], directory: Path) -> None:
    """Write config.json, and generation_config.json with its begin and end tokens."""
    write_json(directory / CONFIG, document)
    tokens = {key: document.get(key) for key in ("bos_token_id", "eos_token_id")}
    generation = {key: token for key, token in tokens.items() if token is not None}
    write_json(directory / GENERATION_CONFIG, generation)


def stop_token_ids(directory: Path, *known: int | None) -> frozenset[int]:
    """Return all end tokens of a model directory and those already known, e.g. the tokenizer's."""
    path = directory / GENERATION_CONFIG
    documents = [read_config(directory), json.loads(path.read_bytes()) if path.is_file() else {}]
    found: set[int | None] = set(known)
    for document in documents:
        listed = document.get("eos_token_id")
        found.update(listed if isinstance(listed, list) else [listed])
    return frozenset(int(token_id) for token_id in found if token_id is not None)


def _check_expressible(config: DecoderConfig) -> None:
    if config.shape == "llama" and config.sliding_window is not None:
        raise ModelFormatError(
            f"sliding_window={config.sliding_window} has no place in the llama layout. "
            "Use shape mistral, qwen2 or qwen3, or unset it."
        )
    if config.shape == "llama" and config.hidden_size % config.num_heads:
        raise ModelFormatError(
            f"transformers refuses a llama whose hidden_size={config.hidden_size} is not a "
            f"multiple of num_heads={config.num_heads}. Use another width, or shape mistral."
        )


def _shape_of(document: Mapping[str, Any]) -> Shape:
    named = document.get("architectures") or []
    architecture = named[0].removeprefix(_VARIED) if named else None
    if architecture is None:
        for shape in ARCHITECTURES:
            if document.get("model_type") == shape:
                return shape
    elif architecture in _SHAPES:
        return _SHAPES[architecture]
    found = architecture or document.get("model_type")
    raise ModelFormatError(
        f"architecture `{found}` is not supported; there are: {', '.join(_SHAPES)}."
    )


def _rope_parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary options in the layout of transformers 5, whichever the file is in."""
    given = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise ModelFormatError(f"{CONFIG}: rotary options that differ by layer are not supported.")
    theta = given.get("rope_theta", document.get("rope_theta", 10_000.0))
    return {**given, "rope_theta": theta}


def _to_hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def _from_hf_scaling(rope: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": rope.get("factor")}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings")
        return {
            "kind": "llama3",
            "factor": rope.get("factor"),
            "low_freq_factor": rope.get("low_freq_factor"),
            "high_freq_factor": rope.get("high_freq_factor"),
            "original_max_seq_len": original or document.get("max_position_embeddings"),
        }
    raise ModelFormatError(
        f"{CONFIG}: rotary scaling `{kind}` is not supported; there are: default, linear, llama3."
    )


def _head_dim(shape: Shape, document: Mapping[str, Any]) -> int | None:
    if shape == "qwen3":  # Qwen3Config's default is a number, not hidden / heads.
        return int(document.get("head_dim") or 128)
    return document.get("head_dim")


def _sliding_window(shape: Shape, document: Mapping[str, Any]) -> int | None:
    if shape == "llama":
        return None
    if shape == "mistral":
        return document.get("sliding_window", 4096)
    if not document.get("use_sliding_window", False):
        return None
    window = document.get("sliding_window", 4096)
    num_layers = document["num_hidden_layers"]
    first = min(document.get("max_window_layers", 28), num_layers)
    kinds = document.get("layer_types") or (
        ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    )
    if len(set(kinds)) > 1:
        raise ModelFormatError(
            f"{CONFIG}: a sliding window in some layers only is not supported "
            f"({kinds.count('sliding_attention')} of {num_layers} layers have one)."
        )
    return window if "sliding_attention" in kinds else None


def _single_token(token: int | list[int] | None) -> int | None:
    if not isinstance(token, list):
        return token
    if len(token) > 1:
        warnings.warn(
            f"{CONFIG}: of the end tokens {token} the configuration keeps {token[0]}", stacklevel=3
        )
    return token[0] if token else None
