"""A published decoder as a GGUF file for llama.cpp, its integers taken over as they are.

Takes a model directory, dense or compressed; gives one file with tokenizer. Int8 becomes Q8_0 and
int4 by group Q4_0: the same integers at the same scales, so the same weights to the last bit (what
llama.cpp does to activations is its own choice). It does not know how the integers were chosen.

Source: github.com/ggml-org/ggml, docs/gguf.md and src/ggml-common.h (block_q8_0, block_q4_0).

O output features, I input features, K blocks of a row, S = 32 weights of a block
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import ModelFormatError
from cluster.storage import storage_errors, verify_directory
from jobs.compression import quantization_config
from jobs.compression.packing import read_quantized
from jobs.config import DecoderConfig
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.kernels.formats import Layout, QuantizedWeight
from jobs.models import _hf, _weights

_logger = logging.getLogger(__name__)
DenseType = Literal["BF16", "Q8_0", "Q4_0"]
_BLOCK = 32
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# How a text is cut before merges, by what llama.cpp calls it. Source: convert_hf_to_gguf.py.
_GPT2_CUT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SPECIAL, _NORMAL = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in the file."""

    data: NDArray[Any]
    kind: gguf.GGMLQuantizationType


def export_gguf(
    directory: Path,
    target: Path,
    *,
    dense: DenseType = "BF16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Write the file and return the type of every matrix by its name there.

    `dense` is what matrices that are not quantized become: BF16, or rounded to nearest. `progress`
    hears of tensors converted, of how many. Raises
    ModelFormatError for what GGUF or llama.cpp cannot express: FP8, groups that 32 does not divide,
    a scale too small for float16, scaled or windowed positions, a tokenizer that is no byte-level
    BPE; TokenizerError for ids that the model does not have, IntegrityError for damaged files,
    StorageError where the file cannot be written.
    """
    verify_directory(directory)
    document = _hf.read_config(directory)
    config = _hf.from_hf_config(document)
    architecture = _architecture(config)
    _warn_of_cache(document, config)
    tensors = dict(_weights.read_tensors(directory))
    layouts = _layouts(document, tensors)
    with storage_errors(f"writing {target}"):
        writer = gguf.GGUFWriter(target, architecture)
        _add_config(writer, config)
        _add_tokenizer(writer, directory, config)
        kinds = _add_tensors(writer, tensors, layouts, config, dense, progress)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return kinds


def _architecture(config: DecoderConfig) -> str:
    if config.rope_scaling is not None:
        raise ModelFormatError("GGUF export knows no scaled rotary positions (`rope_scaling`).")
    if config.sliding_window is not None and config.sliding_window < config.max_seq_len:
        raise ModelFormatError("GGUF export knows no sliding window of attention.")
    if config.intermediate_sizes is not None:
        raise ModelFormatError(
            f"GGUF export knows no blocks of different width (intermediate_sizes="
            f"{list(config.intermediate_sizes)}). Prune to one `intermediate_size` instead."
        )
    return _ARCHITECTURES[config.shape]


def _warn_of_cache(document: Mapping[str, Any], config: DecoderConfig) -> None:
    quantization = document.get(quantization_config.KEY) or {}
    if quantization_config.read_kv_cache(quantization, config.resolved_head_dim) == "int8":
        _logger.warning(
            "GGUF does not say how keys and values are cached, and this model's recipe says int8: "
            "start llama.cpp with `--cache-type-k q8_0 --cache-type-v q8_0`"
        )


def _layouts(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    quantization = document.get(quantization_config.KEY)
    if quantization is None:
        return {}
    shapes = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_shape":
            shapes[layer] = (int(tensor[0]), int(tensor[1]))
        elif kind == "weight" and tensor.ndim == 2 and layer != "model.embed_tokens":
            shapes[layer] = (tensor.shape[0], tensor.shape[1])
    return quantization_config.read_layouts(quantization, shapes)


def _add_config(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.resolved_head_dim)
    writer.add_value_length(config.resolved_head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.resolved_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: DecoderConfig) -> None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelFormatError(f"{directory} has no tokenizer.json, which GGUF has to hold.")
    document = json.loads(path.read_text())
    model = document["model"]
    tokenizer = load_tokenizer(directory)
    check_fits(tokenizer, config.vocab_size)
    cut = {key: (document.get("pre_tokenizer") or {}).get(key) for key in _GPT2_CUT}
    if model.get("type") != "BPE" or cut != _GPT2_CUT or document.get("normalizer"):
        raise ModelFormatError(
            f"{path}: only byte-level BPE that cuts text as GPT-2 does can be written to GGUF."
        )
    tokens = [f"[unused{number}]" for number in range(config.vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, _NORMAL
    for added in document.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _SPECIAL if added["special"] else int(gguf.TokenType.USER_DEFINED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    bos = tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
        # What the tokenizer puts before a text is what it makes of none.
        writer.add_add_bos_token(value=tokenizer.encode("")[:1] == [bos])
    if config.eos_token_id is not None:
        writer.add_eos_token_id(config.eos_token_id)
    template = directory / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def _add_tensors(
    writer: gguf.GGUFWriter,
    tensors: dict[str, Tensor],
    layouts: Mapping[str, Layout],
    config: DecoderConfig,
    dense: DenseType,
    progress: Callable[[int, int], None],
) -> dict[str, str]:
    kinds = {}
    names = [name for name in tensors if name.endswith((".weight", ".weight_packed", ".bias"))]
    for number, name in enumerate(names, start=1):
        progress(number, len(names))
        layer, _, kind = name.rpartition(".")
        if layer in layouts and kind != "bias":
            shape = _shape(tensors, layer)
            found = read_quantized(tensors, layer, layouts[layer], shape)
            stored = _quantized(layer, _permuted(layer, found, config))
        else:
            tensor = tensors.pop(name).float()
            if _is_rotated(layer, config) and not layer.endswith("norm"):
                tensor = tensor[_rotary_order(tensor.shape[0], config)]
            stored = _plain(name, tensor, dense)
        renamed = f"{_rename(layer)}.{'bias' if kind == 'bias' else 'weight'}"
        writer.add_tensor(renamed, stored.data, raw_dtype=stored.kind)
        if kind != "bias":
            kinds[renamed] = stored.kind.name
    return kinds


def _shape(tensors: Mapping[str, Tensor], layer: str) -> tuple[int, int]:
    stored = tensors.get(f"{layer}.weight_shape")
    rows, columns = tensors[f"{layer}.weight"].shape if stored is None else stored.tolist()
    return rows, columns


def _rename(layer: str) -> str:
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    _, _, block, part = layer.split(".", 3)
    return f"blk.{block}.{_NAMES[part]}"


def _is_rotated(layer: str, config: DecoderConfig) -> bool:
    """Say whether llama.cpp wants a layer's rows in another order: it rotates neighbours there."""
    is_rotated = layer.endswith((".q_proj", ".k_proj"))
    return is_rotated and _ARCHITECTURES[config.shape] == "llama"


def _rotary_order(num_rows: int, config: DecoderConfig) -> Tensor:
    """Return the order of rows in which the halves of every head alternate."""
    return (
        torch.arange(num_rows).view(-1, 2, config.resolved_head_dim // 2).transpose(1, 2).flatten()
    )


def _permuted(layer: str, weight: QuantizedWeight, config: DecoderConfig) -> QuantizedWeight:
    if not _is_rotated(layer, config):
        return weight
    order = _rotary_order(weight.out_features, config)
    return QuantizedWeight(
        weight.scheme, weight.values_OI[order], weight.scale_OG[order], weight.group_size
    )


def _plain(name: str, tensor: Tensor, dense: DenseType) -> _Stored:
    values = tensor.numpy()
    if tensor.ndim == 1:
        return _Stored(values, gguf.GGMLQuantizationType.F32)
    if dense != "BF16" and tensor.shape[1] % _BLOCK:
        raise ModelFormatError(
            f"`{name}` has rows of {tensor.shape[1]} values, which the blocks of {_BLOCK} of "
            f"{dense} do not divide. Export it as BF16."
        )
    kind = gguf.GGMLQuantizationType[dense]
    return _Stored(gguf.quants.quantize(values, kind), kind)


def _quantized(layer: str, weight: QuantizedWeight) -> _Stored:
    """Return integers and scales as blocks of 32, each with its scale in float16 before it."""
    columns, groups = weight.in_features, weight.scale_OG.shape[1]
    if weight.scheme == "fp8":
        raise ModelFormatError(f"`{layer}` is FP8, which GGUF does not have.")
    if (columns // groups) % _BLOCK:
        raise ModelFormatError(
            f"`{layer}` has a scale for every {columns // groups} inputs, which blocks of {_BLOCK} "
            "do not divide. Quantize with group_size 32, 64 or 128."
        )
    scale_OK = weight.scale_OG.repeat_interleave(columns // groups // _BLOCK, dim=1)
    half_OK = scale_OK.half()
    if not torch.equal(half_OK.float(), scale_OK):
        raise ModelFormatError(
            f"`{layer}` has scales that float16 does not hold (the smallest is "
            f"{float(scale_OK.min()):.2g}), so GGUF cannot hold its weights."
        )
    values_OKS = weight.values_OI.unflatten(1, (-1, _BLOCK))
    if weight.scheme in ("w8a8", "w8a16"):
        body, kind = values_OKS.view(torch.uint8), gguf.GGMLQuantizationType.Q8_0
    else:
        # The first half of a block lies in the low nibbles, the second in the high ones.
        low, high = (values_OKS.to(torch.int16) + 8).to(torch.uint8).chunk(2, dim=-1)
        body, kind = low | (high << 4), gguf.GGMLQuantizationType.Q4_0
    head = half_OK[:, :, None].contiguous().view(torch.uint8)
    return _Stored(torch.cat([head, body], dim=-1).flatten(1).numpy(), kind)
