"""Encoders on disk and back: dense or compressed, in the compressed-tensors scheme.

Takes a compressed encoder; gives a directory that transformers and sentence-transformers read.
Takes such a directory; gives an encoder whose linear layers hold packed weights and run on the
fastest operators of this machine. It does not know how weights were chosen.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cluster.storage import verify_directory
from jobs.compression import quantization_config
from jobs.compression.packing import SHARD_BYTES, fill, stored_state
from jobs.compression.recipe import Compressed
from jobs.kernels.formats import Layout, Scheme
from jobs.kernels.linear import resident_bytes
from jobs.models import _hf, _weights
from jobs.models._bert import to_hf_config, write_encoder_config
from jobs.models.encoder import (
    POOLER,
    Encoder,
    EncoderConfig,
    linear_names,
    read_config,
    read_tensors,
)


@dataclass
class LoadedEncoder:
    """An encoder ready to run: formats and operators by layer name, resident weight bytes."""

    model: Encoder
    config: EncoderConfig
    schemes: dict[str, Scheme]
    operators: dict[str, str]
    weight_bytes: int


def save_encoder(compressed: Compressed[Encoder], directory: Path) -> None:
    """Write configs and safetensors; neither tokenizer nor manifest.

    What is not quantized is stored in bfloat16. Raises StorageError where writing fails.
    """
    model, quantized = compressed.model, compressed.quantized
    document = to_hf_config(model.config)
    document["dtype"] = "bfloat16"
    if quantized:
        dense = [name for name in linear_names(model) if name not in quantized]
        document[quantization_config.KEY] = quantization_config.to_document(
            {name: weight.layout for name, weight in quantized.items()},
            [*dense, *([POOLER] if model.config.has_pooler else [])],
        )
    _weights.write_tensors(stored_state(model.state_dict(), quantized), directory, SHARD_BYTES)
    write_encoder_config(model.config, document, directory)


def load_encoder(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> LoadedEncoder:
    """Read a dense or compressed encoder for inference, as `packing.load_model` reads a decoder.

    BERT's own pooler is left out: vectors do not pass it. Raises IntegrityError for damaged files
    and ModelFormatError for what is not supported.
    """
    if verify:
        verify_directory(directory)
    config = read_config(directory).replace(has_pooler=False)
    stored_by_name = read_tensors(directory).items()
    tensors = {name: t for name, t in stored_by_name if not name.startswith(POOLER)}
    with torch.device("meta"):
        model = Encoder(config)
    shapes = {name: _shape(model.get_submodule(name)) for name in linear_names(model)}
    document = _hf.read_config(directory).get(quantization_config.KEY)
    layouts: dict[str, Layout] = {}
    if document is not None:
        layouts = quantization_config.read_layouts(document, shapes)
        quantization_config.refuse_kv_cache(document, "an encoder keeps none")
    operators = fill(model, tensors, layouts, (dtype, torch.device(device)), directory)
    schemes: dict[str, Scheme] = {
        name: layouts[name].scheme if name in layouts else "bf16" for name in shapes
    }
    return LoadedEncoder(model.eval(), config, schemes, operators, resident_bytes(model))


def _shape(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.Linear), f"{type(layer).__name__} is no linear layer"
    return layer.out_features, layer.in_features
