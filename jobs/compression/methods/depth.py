"""Depth pruning: leave out consecutive blocks, those whose whole changes the text's states least.

Takes a decoder and text; gives a decoder with fewer blocks, smaller and faster by their share. A
repair step afterwards teaches it to do without them.

Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, section 3.2.

N sequences, T tokens, C hidden width, L blocks
"""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cluster.config import StrictModel
from cluster.errors import RecipeError
from jobs.config import DecoderConfig
from jobs.kernels.formats import Layout
from jobs.models.decoder import Block, Decoder

_TOKENS_AT_ONCE = 4096


class Options(StrictModel):
    """How many blocks are left out, and which."""

    num_blocks: int = Field(ge=1, description="Consecutive blocks that are left out.")
    first: int | None = Field(
        None, ge=0, description="The first of them; unset: where the text's states change least."
    )


def layout(options: Options) -> Layout | None:
    """Return None: the blocks that stay are stored as they were."""
    return None


def reshape(config: DecoderConfig, options: Options) -> DecoderConfig:
    """Return the configuration with fewer blocks."""
    last = (options.first or 0) + options.num_blocks
    if options.num_blocks >= config.num_layers or last > config.num_layers:
        raise RecipeError(
            f"num_blocks={options.num_blocks} from block {options.first or 0} on cannot be left "
            f"out of {config.num_layers}. Lower it; one block has to stay."
        )
    sizes = list(config.mlp_sizes)
    if options.first is None and config.intermediate_sizes is not None:
        raise RecipeError(
            f"which blocks are left out decides the shape, and the widths of their MLPs differ "
            f"({sizes}). Give `first`, or leave out blocks before `width`."
        )
    first = options.first or 0
    del sizes[first : first + options.num_blocks]
    return config.with_mlp_sizes(sizes)


def cut(model: Decoder, text_NT: Tensor, options: Options) -> None:
    """Leave the blocks out."""
    config = reshape(model.config, options)
    first = options.first
    if first is None:
        first = int(_distances(model, text_NT, options.num_blocks).argmin())
    del model.model.layers[first : first + options.num_blocks]
    for number, block in enumerate(model.model.layers):
        assert isinstance(block, Block), "a decoder has blocks"
        block.self_attn.layer = block.mlp.layer = number
    model.config = config


def _distances(model: Decoder, text_NT: Tensor, num_blocks: int) -> Tensor:
    """Return the mean angle, over pi, by which so many blocks turn a token's state, by the first.

    The shape is [L - num_blocks + 1].
    """
    layers, device = model.model.layers, model.model.embed_tokens.weight.device
    sums = torch.zeros(len(layers) - num_blocks + 1, device=device)
    length = text_NT.shape[1]
    with torch.inference_mode():
        positions_1T = torch.arange(length, device=device)[None]
        rotation = model.rotary(positions_1T, torch.float32)
        for rows in text_NT.split(max(1, _TOKENS_AT_ONCE // length)):
            h_BTC = model.model.embed_tokens(rows.to(device, torch.long))
            before = [h_BTC]  # Of the last `num_blocks` blocks, and after them.
            for number, block in enumerate(layers):
                h_BTC = block(h_BTC, *rotation)
                before.append(h_BTC)
                if len(before) > num_blocks:
                    cosine_BT = cosine_similarity(before.pop(0), h_BTC, dim=-1).clamp(-1, 1)
                    sums[number + 1 - num_blocks] += cosine_BT.acos().sum() / math.pi
    return sums / text_NT.numel()
