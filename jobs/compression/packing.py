"""Compressed models on disk and back, in the compressed-tensors scheme.

Takes a compressed model; gives config.json and safetensors that transformers and vLLM read as
they are. Takes such a directory, or a dense one; gives a decoder whose linear layers hold packed
weights and run on the fastest operators of this machine. It does not know how weights were chosen.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.errors import ModelFormatError
from cluster.storage import GIB, MANIFEST, verify_directory
from jobs.compression import quantization_config
from jobs.compression.recipe import Compressed
from jobs.config import DecoderConfig, KvCache
from jobs.kernels.formats import (
    CHANNELED,
    PACKED_BITS,
    Layout,
    QuantizedWeight,
    Scheme,
    num_words,
    pack_values,
    unpack_values,
)
from jobs.kernels.linear import build_linear, resident_bytes
from jobs.kernels.memory import StoredEmbedding, give_back
from jobs.models import _hf, _weights
from jobs.models.decoder import Decoder

SHARD_BYTES = 5 * GIB
_SCALE_DTYPE = torch.bfloat16
_EMBEDDING = "model.embed_tokens.weight"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


@dataclass
class LoadedModel:
    """A model ready to run: formats and operators by layer name, resident weight bytes.

    `kv_cache` is how an engine shall keep keys and values, unless it is told otherwise.
    """

    model: Decoder
    config: DecoderConfig
    schemes: dict[str, Scheme]
    operators: dict[str, str]
    weight_bytes: int
    kv_cache: KvCache = "auto"


def save_compressed(compressed: Compressed, directory: Path) -> None:
    """Write config.json, generation_config.json and safetensors; neither tokenizer nor manifest.

    What is not quantized is stored in bfloat16. A model without any quantized layer or cache
    becomes a plain dense directory. Raises ModelFormatError for a config its family cannot
    express, and StorageError where writing fails.
    """
    model, quantized = compressed.model, compressed.quantized
    document = _hf.to_hf_config(model.config)
    document["dtype"] = str(_SCALE_DTYPE).removeprefix("torch.")
    is_cache_int8 = compressed.recipe.kv_cache == "int8"
    if quantized or is_cache_int8:
        document[quantization_config.KEY] = quantization_config.to_document(
            {name: weight.layout for name, weight in quantized.items()},
            [name for name in _linear_shapes(model) if name not in quantized],
            model.config.resolved_head_dim if is_cache_int8 else None,
        )
    state = model.state_dict()
    if model.config.tie_embeddings and "lm_head" not in quantized:
        del state["lm_head.weight"]
    _weights.write_tensors(stored_state(state, quantized), directory, SHARD_BYTES)
    _hf.write_config(document, directory)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside a model's weights: tokenizer, chat template, end tokens, licence.

    generation_config.json comes from the source, since it may list more end tokens than
    config.json holds.
    """
    for path in source.iterdir():
        is_written = path.name in (MANIFEST, _hf.CONFIG) or path.name.startswith(".")
        if path.is_file() and not is_written and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> LoadedModel:
    """Read a dense or compressed model directory for inference.

    Activations and unquantized weights are `dtype`; quantized weights stay packed. Each linear
    layer takes the operator that measured fastest for its shape. With `verify`, every file is
    checked against the manifest first. Raises IntegrityError for damaged files and
    ModelFormatError for what is not supported.
    """
    if verify:
        verify_directory(directory)
    document = _hf.read_config(directory)
    config = _hf.from_hf_config(document)
    with torch.device("meta"):
        model = Decoder(config)
    shapes = _linear_shapes(model)
    layouts: dict[str, Layout] = {}
    kv_cache: KvCache = "auto"
    if (quantization := document.get(quantization_config.KEY)) is not None:
        layouts = quantization_config.read_layouts(quantization, shapes)
        kv_cache = quantization_config.read_kv_cache(quantization, config.resolved_head_dim)
    tensors = dict(_weights.read_tensors(directory))
    if config.tie_embeddings:
        _take_tied_head(tensors, layouts, directory)
    operators = fill(model, tensors, layouts, (dtype, torch.device(device)), directory)
    del tensors
    give_back()
    schemes: dict[str, Scheme] = {
        name: layouts[name].scheme if name in layouts else "bf16" for name in shapes
    }
    weight_bytes = resident_bytes(model)
    return LoadedModel(model.eval(), config, schemes, operators, weight_bytes, kv_cache)


def read_quantized(
    tensors: dict[str, Tensor], layer: str, layout: Layout, shape: tuple[int, int]
) -> QuantizedWeight:
    """Take one layer's stored tensors out of `tensors` and return its values and scales.

    Raises ModelFormatError where one is missing, or of a shape or type that is not the format's.
    """
    rows, columns = shape
    scale_OG = _take(
        tensors, f"{layer}.weight_scale", (rows, layout.num_groups(columns)), layout, None
    )
    if layout.scheme in CHANNELED:
        dtype = CHANNELED[layout.scheme]
        values_OI = _take(tensors, f"{layer}.weight", shape, layout, dtype)
    else:
        width = num_words(columns, PACKED_BITS[layout.scheme])
        packed_OW = _take(tensors, f"{layer}.weight_packed", (rows, width), layout, torch.int32)
        stored_shape = _take(tensors, f"{layer}.weight_shape", (2,), layout, None)
        if tuple(stored_shape.tolist()) != shape:
            raise ModelFormatError(
                f"`{layer}.weight_shape` is {stored_shape.tolist()}, and the config asks for "
                f"{list(shape)}."
            )
        values_OI = unpack_values(packed_OW, columns, PACKED_BITS[layout.scheme])
    return QuantizedWeight(layout.scheme, values_OI, scale_OG.float(), layout.group_size)


def stored_state(
    state: Mapping[str, Tensor], quantized: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Return a model's tensors as they lie on disk; what is not quantized is bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if layer in quantized:
            tensors |= {f"{layer}.{key}": t for key, t in stored(quantized[layer]).items()}
        else:
            tensors[name] = tensor.detach().to("cpu", torch.bfloat16)
    return tensors


def stored(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of one layer as they lie on disk, by what follows the layer's name."""
    scale_OG = weight.scale_OG.to(_SCALE_DTYPE)
    if weight.scheme in CHANNELED:
        return {"weight": weight.values_OI, "weight_scale": scale_OG}
    return {
        "weight_packed": pack_values(weight.values_OI, PACKED_BITS[weight.scheme]),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(weight.values_OI.shape, dtype=torch.int64),
    }


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    layouts: dict[str, Layout],
    placement: tuple[torch.dtype, torch.device],
    directory: Path,
) -> dict[str, str]:
    """Put weights into a model on the meta device; return the operator of each linear layer.

    `tensors` is emptied on the way, so that a weight is held twice for one layer at a time only.
    """
    dtype, device = placement
    is_tied = isinstance(model, Decoder) and model.config.tie_embeddings
    operators = {}
    for layer, shape in _linear_shapes(model).items():
        if layer == "lm_head" and is_tied:
            continue
        bias = tensors.pop(f"{layer}.bias", None)
        wants_bias = model.get_submodule(layer).bias is not None
        if wants_bias != (bias is not None):
            state = "lacks" if wants_bias else "holds an unexpected"
            raise ModelFormatError(f"{directory} {state} `{layer}.bias`.")
        weight: Tensor | QuantizedWeight
        if layer in layouts:
            weight = read_quantized(tensors, layer, layouts[layer], shape)
        else:
            weight = _take(tensors, f"{layer}.weight", shape, Layout("bf16"), None)
        built = build_linear(weight, bias, dtype=dtype, device=device)
        operators[layer] = built.operator
        _replace(model, layer, built)
    rest = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if tensor.is_meta and not (is_tied and name == "lm_head.weight")
    }
    _weights.check_tensors(tensors, rest, directory)
    embedding = tensors.get(_EMBEDDING)
    for name in rest:
        _assign(model, name, tensors.pop(name).to(device, dtype))
    if is_tied and embedding is not None:
        operators["lm_head"] = _tie_head(model, embedding, dtype, device)
    if isinstance(model, Decoder) and embedding is not None:
        _store_embedding(model, embedding, dtype, device)
    return operators


def _store_embedding(
    model: Decoder, embedding: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Keep an embedding in the bfloat16 of its file, unless the head shares its memory.

    Its rows are read one a token: a wider copy would be held for nothing.
    """
    is_shared = getattr(model.lm_head, "weight", None) is model.model.embed_tokens.weight
    if embedding.dtype == torch.bfloat16 != dtype and not is_shared:
        stored = StoredEmbedding(embedding.to(device, copy=True), dtype)  # Not the file's mapping.
        _replace(model, "model.embed_tokens", stored)


def _tie_head(model: nn.Module, embedding: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    """Give the head the embedding's weight, and return its operator.

    An operator with a form of its own for weights takes a copy in bfloat16: reading half the bytes
    for every token is worth them.
    """
    assert isinstance(model, Decoder), "only decoders have a head"
    head = build_linear(embedding, None, dtype=dtype, device=device)
    if head.source.in_place is None:
        model.tie()
    else:
        _replace(model, "lm_head", head)
    return head.operator


def _take(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    layout: Layout,
    dtype: torch.dtype | None,
) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise ModelFormatError(
            f"the weights lack `{name}`, which a layer of format {layout.scheme} has. The files "
            "do not belong to this config, or a shard is absent."
        )
    if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
        wanted = "" if dtype is None else f" {dtype}"
        raise ModelFormatError(
            f"`{name}` is {list(tensor.shape)} {tensor.dtype}, and the config asks for "
            f"{list(shape)}{wanted}."
        )
    return tensor


def _take_tied_head(
    tensors: dict[str, Tensor], layouts: dict[str, Layout], directory: Path
) -> None:
    if "lm_head" in layouts:
        raise ModelFormatError(
            f"{directory} quantizes `lm_head`, which shares its weight with the embedding; that "
            "is not supported. Put lm_head on the ignore list and quantize again."
        )
    head = tensors.pop("lm_head.weight", None)
    embedding = tensors.get(_EMBEDDING)
    if head is not None and (embedding is None or not torch.equal(head, embedding)):
        raise ModelFormatError(
            f"{directory} stores an `lm_head.weight` that differs from the embedding, though its "
            "config ties them. Set tie_word_embeddings to false."
        )


def _linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _replace(model: nn.Module, layer: str, built: nn.Module) -> None:
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, built)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=False))
