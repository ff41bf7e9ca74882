"""Which linear layers of a decoder's block read the same input, and how that input is scaled.

Takes a decoder and a block; gives its groups of layers, and divides a group's input by factors
without changing what the model computes. It does not know where factors come from.

H query heads, K key/value heads, D size of a head, I input features
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jobs.models.decoder import Decoder

HEAD = "lm_head"
_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SharedInput:
    """Layers that read one input, and the module that scales it with its outputs."""

    layers: tuple[str, ...]
    producer: str


def shared_inputs(block: int) -> tuple[SharedInput, ...]:
    """Return the groups of a block, in the order in which it computes them."""
    prefix = f"model.layers.{block}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return (
        SharedInput(
            (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            f"{prefix}.input_layernorm",
        ),
        SharedInput((f"{attention}.o_proj",), f"{attention}.v_proj"),
        SharedInput((f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{prefix}.post_attention_layernorm"),
        SharedInput((f"{mlp}.down_proj",), f"{mlp}.up_proj"),
    )


def feasible_scale(model: Decoder, group: SharedInput, scale_I: Tensor) -> Tensor:
    """Return factors that the producer can carry out, nearest to those wanted.

    Query heads that share a value head read the same values, so they share factors: the geometric
    mean of theirs.
    """
    if not _reads_values(group):
        return scale_I
    config = model.config
    repeats = config.num_heads // config.num_kv_heads
    log_KRD = scale_I.log().view(config.num_kv_heads, repeats, config.resolved_head_dim)
    return log_KRD.mean(dim=1, keepdim=True).expand_as(log_KRD).exp().flatten()


@torch.no_grad()
def divide_input(model: Decoder, group: SharedInput, scale_I: Tensor) -> None:
    """Divide a group's input by feasible factors, and multiply its layers' weights by them."""
    for layer in group.layers:
        _parameter(model, layer, "weight").mul_(scale_I)
    divisor_O = scale_I
    if _reads_values(group):
        config = model.config
        heads_KRD = scale_I.view(config.num_kv_heads, -1, config.resolved_head_dim)
        divisor_O = heads_KRD[:, 0].flatten()
    producer = model.get_submodule(group.producer)
    weight = _parameter(model, group.producer, "weight")
    weight.div_(divisor_O if weight.ndim == 1 else divisor_O[:, None])
    if isinstance(producer, nn.Linear) and producer.bias is not None:
        producer.bias.div_(divisor_O)


def group_of(layer: str) -> SharedInput | None:
    """Return the group a layer of a block belongs to; None for other layers."""
    block = block_of(layer)
    groups = () if block is None else shared_inputs(block)
    return next((group for group in groups if layer in group.layers), None)


def block_of(layer: str) -> int | None:
    """Return the number of the block that a layer is in; None for other layers."""
    found = _IN_BLOCK.match(layer)
    return int(found[1]) if found else None


def _reads_values(group: SharedInput) -> bool:
    return group.producer.endswith("v_proj")


def _parameter(model: Decoder, module: str, name: str) -> Tensor:
    found = getattr(model.get_submodule(module), name)
    assert isinstance(found, nn.Parameter), f"{module}.{name} is no parameter"
    return found
