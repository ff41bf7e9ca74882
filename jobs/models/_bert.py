"""Files that describe an encoder: config.json and those of sentence-transformers beside it.

Takes an EncoderConfig or a model directory; gives the other. Strict both ways: what encoder.py does
not compute is refused by name, never ignored. It does not know about weights or torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cluster.config import StrictModel
from cluster.errors import ModelFormatError
from cluster.storage import write_atomic, write_json
from jobs.models._hf import CONFIG, read_config, shape_from

ARCHITECTURE = "BertModel"
MODULES = "modules.json"
SENTENCE = "sentence_bert_config.json"
POOLING = "1_Pooling"
_PREFIX = "pooling_mode_"
_POOLINGS = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
_COMPUTED_AS = {  # Options of BERT with the one value that encoder.py computes.
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class EncoderConfig(StrictModel):
    """A BERT-shape encoder and how its hidden states become one vector."""

    vocab_size: int = Field(ge=2, description="Token ids.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream and of a vector.")
    intermediate_size: int = Field(ge=1, description="Width within the feed-forward layers.")
    num_layers: int = Field(ge=1, description="Blocks.")
    num_heads: int = Field(ge=1, description="Attention heads; they divide `hidden_size`.")
    num_positions: int = Field(512, ge=1, description="Rows of the position embedding.")
    max_seq_len: int = Field(512, ge=1, description="Tokens of the longest input.")
    num_token_types: int = Field(2, ge=1, description="Rows of the token type embedding.")
    norm_eps: float = Field(1e-12, gt=0, description="Added to variances.")
    pooling: Literal["mean", "cls"] = Field("mean", description="The mean of all, or the first.")
    has_pooler: bool = Field(True, description="Whether BERT's own pooler is stored; not computed.")
    pad_token_id: int = Field(0, ge=0, description="Kept for other libraries; nothing is padded.")
    initializer_range: float = Field(0.02, gt=0, description="Deviation of fresh weights.")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide {self.hidden_size}")
        if self.max_seq_len > self.num_positions:
            raise ValueError(
                f"max_seq_len={self.max_seq_len} exceeds num_positions={self.num_positions}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


def is_encoder(document: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes an encoder rather than a model that generates."""
    return ARCHITECTURE in (document.get("architectures") or [])


def read_encoder_config(directory: Path) -> EncoderConfig:
    """Return the encoder that a directory describes; `quantization_config` is the caller's.

    Raises ModelFormatError for another architecture, an option or a pooling that is not supported,
    and for values that are missing or out of bounds. Without sentence-transformers' files the
    vector is the mean of all tokens, as there.
    """
    document = read_config(directory)
    if not is_encoder(document):
        found = document.get("architectures") or document.get("model_type")
        raise ModelFormatError(f"architecture {found} is no encoder; there is: {ARCHITECTURE}.")
    for key, computed in _COMPUTED_AS.items():
        if (found := document.get(key, computed)) != computed:
            raise ModelFormatError(
                f"{CONFIG}: `{key}` = {found!r} is not supported; only {computed!r} is."
            )
    num_positions = document.get("max_position_embeddings", 512)
    values = {
        "vocab_size": document.get("vocab_size"),
        "hidden_size": document.get("hidden_size"),
        "intermediate_size": document.get("intermediate_size"),
        "num_layers": document.get("num_hidden_layers"),
        "num_heads": document.get("num_attention_heads"),
        "num_positions": num_positions,
        "max_seq_len": _max_seq_len(directory, num_positions),
        "num_token_types": document.get("type_vocab_size", 2),
        "norm_eps": document.get("layer_norm_eps", 1e-12),
        "pooling": _pooling(directory),
        "pad_token_id": document.get("pad_token_id") or 0,
        "initializer_range": document.get("initializer_range", 0.02),
    }
    return shape_from(EncoderConfig, values, what="encoder")


def to_hf_config(config: EncoderConfig) -> dict[str, Any]:
    """Return the config.json of an encoder."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.num_positions,
        "type_vocab_size": config.num_token_types,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }


def write_encoder_config(
    config: EncoderConfig, document: Mapping[str, Any], directory: Path
) -> None:
    """Write config.json as given, and the files by which sentence-transformers pools alike."""
    write_json(directory / CONFIG, dict(document))
    kinds = (("", "Transformer"), (POOLING, "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (path, kind) in enumerate(kinds)
    ]
    write_atomic(directory / MODULES, json.dumps(modules, indent=2).encode() + b"\n")
    write_json(
        directory / POOLING / CONFIG,
        {
            "word_embedding_dimension": config.hidden_size,
            f"{_PREFIX}mean_tokens": config.pooling == "mean",
            f"{_PREFIX}cls_token": config.pooling == "cls",
        },
    )
    write_json(directory / SENTENCE, {"max_seq_length": config.max_seq_len, "do_lower_case": False})


def _max_seq_len(directory: Path, num_positions: Any) -> Any:
    path = directory / SENTENCE
    if not path.is_file():
        return num_positions
    return _read(path).get("max_seq_length") or num_positions


def _pooling(directory: Path) -> str:
    if not (directory / MODULES).is_file():
        return "mean"
    folder = None
    for module in _read(directory / MODULES):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelFormatError(
                f"{MODULES}: a `{kind}` module is not supported; there are: Transformer, Pooling, "
                "Normalize."
            )
        if kind == "Pooling":
            folder = str(module.get("path", ""))
    if folder is None or Path(folder).name != folder:
        raise ModelFormatError(f"{MODULES} names no folder of a Pooling module beside it.")
    document = _read(directory / folder / CONFIG)
    chosen = [
        key.removeprefix(_PREFIX)
        for key, value in document.items()
        if key.startswith(_PREFIX) and value
    ]
    if isinstance(mode := document.get("pooling_mode"), str):
        chosen.append(mode)
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise ModelFormatError(
            f"{folder}/{CONFIG}: pooling by {' and '.join(chosen) or 'nothing'} is not supported; "
            "there are: mean_tokens, cls_token."
        )
    return _POOLINGS[chosen[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path} cannot be read: {error}") from None
