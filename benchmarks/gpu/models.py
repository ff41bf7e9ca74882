"""Random weights made where they are needed, in the format that is asked for, without a disk.

Takes a shape, a device and a format; gives a model as `load_model` gives it, or transformers' own.
Both have the same dense weights: a tensor depends on its name alone. Random weights cost what
trained ones cost.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.compression.packing import LoadedModel, fill, stored
from jobs.config import DecoderConfig, RopeScaling
from jobs.kernels.formats import (
    DEFAULT_GROUP_SIZE,
    GROUPED,
    Layout,
    Scheme,
    round_to_scale,
    value_range,
)
from jobs.kernels.linear import resident_bytes
from jobs.models import _hf
from jobs.models.decoder import Decoder, linear_names

LLAMA_8B = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=8192,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_seq_len=8192,
    ),
    tie_embeddings=False,
)
TINY = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=512,
    tie_embeddings=False,
)
SHAPES = {"llama-3.1-8b": LLAMA_8B, "tiny": TINY}


@dataclass(frozen=True)
class Place:
    """Where a model is and the type of its activations."""

    device: torch.device
    dtype: torch.dtype


def ours(config: DecoderConfig, scheme: Scheme, place: Place) -> LoadedModel:
    """Return a decoder whose linear layers within blocks have a format; the head is dense."""
    with torch.device("meta"):
        model = Decoder(config)
    layout = Layout(scheme, DEFAULT_GROUP_SIZE if scheme in GROUPED else None)
    chosen = set(linear_names(model)) if scheme != "bf16" else set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in _weights(model, place.device):
        layer = name.removesuffix(".weight")
        if layer in chosen:
            parts = stored(_quantize(tensor, layout))
            tensors |= {f"{layer}.{key}": part for key, part in parts.items()}
        else:
            tensors[name] = tensor
    layouts = dict.fromkeys(chosen, layout)
    operators = fill(model, tensors, layouts, (place.dtype, place.device), Path("random weights"))
    schemes: dict[str, Scheme] = {name: scheme if name in chosen else "bf16" for name in operators}
    return LoadedModel(model.eval(), config, schemes, operators, resident_bytes(model))


def theirs(config: DecoderConfig, place: Place) -> Any:
    """Return transformers' model of the same shape and dense weights."""
    document = _hf.to_hf_config(config)
    with torch.device("meta"):
        decoder = Decoder(config)
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**document), dtype=place.dtype
        )
    model.load_state_dict(dict(_weights(decoder, place.device)))
    return model.eval()


def read_bytes_per_pass(loaded: LoadedModel) -> int:
    """Return the bytes of weights that a pass of few tokens reads: all but the embedding."""
    return loaded.weight_bytes - loaded.model.model.embed_tokens.weight.nbytes


def _weights(model: Decoder, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with its name, in bfloat16."""
    for name, parameter in model.state_dict().items():
        shape = parameter.shape
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
            continue
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        yield name, weight.normal_(0.0, model.config.initializer_range, generator=generator)


def _quantize(weight_OI: Tensor, layout: Layout) -> Any:
    groups = layout.num_groups(weight_OI.shape[1])
    largest_OG = weight_OI.float().unflatten(1, (groups, -1)).abs().amax(dim=-1)
    return round_to_scale(weight_OI, largest_OG / value_range(layout.scheme)[1], layout)
