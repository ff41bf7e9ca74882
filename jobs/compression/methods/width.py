"""Width pruning: leave out channels of the MLPs, heads and hidden channels that matter least.

Takes a decoder and text; gives a decoder of a narrower shape whose weights are those of what stays.
Blocks keep MLPs of one width, or of the widths that are given; `propose_sizes` finds some. How much
a part matters is how large what it gives is: the mean size of its values on the text times the size
of the weights that read them. A repair step afterwards teaches it to do without the rest.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), 2024, section 2.2.

H query heads, K key/value heads, D size of a head, C hidden width, F width of an MLP
"""

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cluster.config import StrictModel
from cluster.errors import RecipeError
from jobs.compression.calibration import CalibrationPass
from jobs.compression.layers import weight_of
from jobs.config import DecoderConfig
from jobs.kernels.formats import Layout
from jobs.models.decoder import Block, Decoder

_Kept = dict[str, Tensor]
_LEAST_WIDTH = 8


class Options(StrictModel):
    """What stays; unset: all of it."""

    intermediate_size: int | None = Field(None, ge=8, description="Channels of an MLP that stay.")
    intermediate_sizes: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="The same for each block, where they shall differ; `raysmith widths` proposes "
        "some.",
    )
    num_kv_heads: int | None = Field(
        None, ge=1, description="Key and value heads that stay, with the query heads that use them."
    )
    hidden_size: int | None = Field(None, ge=8, description="Hidden channels that stay.")

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if self.intermediate_size is not None and self.intermediate_sizes is not None:
            raise ValueError("give either intermediate_size or intermediate_sizes")
        return self


def layout(options: Options) -> Layout | None:
    """Return None: what stays is stored as it was."""
    return None


def reshape(config: DecoderConfig, options: Options) -> DecoderConfig:
    """Return the narrower configuration."""
    changes: dict[str, int] = {}
    for name in ("num_kv_heads", "hidden_size"):
        wanted, now = getattr(options, name), getattr(config, name)
        if wanted is None:
            continue
        if wanted > now:
            raise RecipeError(f"{name}={wanted} is more than the {now} there are. Lower it.")
        changes[name] = wanted
    sizes = _mlp_sizes(config, options)
    if not changes and sizes is None:
        raise RecipeError(
            "nothing would be left out. Give intermediate_size, intermediate_sizes, num_kv_heads "
            "or hidden_size."
        )
    if options.num_kv_heads is not None:
        changes["num_heads"] = config.num_heads // config.num_kv_heads * options.num_kv_heads
    narrow = config.replace(head_dim=config.resolved_head_dim, **changes)
    return narrow if sizes is None else narrow.with_mlp_sizes(sizes)


def cut(model: Decoder, text_NT: Tensor, options: Options) -> None:
    """Keep what matters most of every kind, in its old order."""
    config = reshape(model.config, options)
    hidden_C = torch.zeros(model.config.hidden_size)
    kept: list[_Kept] = []
    for sizes, width in zip(_importances(model, text_NT), config.mlp_sizes, strict=True):
        hidden_C += sizes["hidden"] + sizes["hidden_mlp"]
        heads_K = sizes["heads"].view(model.config.num_kv_heads, -1).sum(dim=1)
        kept.append(
            {
                "heads": _largest(heads_K, config.num_kv_heads),
                "mlp": _largest(sizes["mlp"], width),
            }
        )
    hidden = _largest(hidden_C, config.hidden_size)
    with torch.no_grad():
        for block, parts in zip(model.model.layers, kept, strict=True):
            assert isinstance(block, Block), "a decoder has blocks"
            _narrow_block(block, parts, hidden, model.config)
        _narrow(model.model.norm, hidden)
        _narrow(model.model.embed_tokens, columns=hidden)
        _narrow(model.lm_head, columns=hidden)
    model.config = config
    model.model.embed_tokens.embedding_dim = config.hidden_size
    model.tie()


def mlp_importances(model: Decoder, text_NT: Tensor) -> list[Tensor]:
    """Return how much each channel of each block's MLP matters on a text: [F] a block."""
    return [sizes["mlp"] for sizes in _importances(model, text_NT)]


def propose_sizes(
    importances: Sequence[Tensor], keep: float, multiple_of: int = 128
) -> tuple[int, ...]:
    """Return widths of MLPs that keep about a share of all channels, where they matter most.

    Channels are kept in groups of `multiple_of`, the best of a block together; groups of the
    largest sums stay, whichever block they are of, and at least one a block. Raises RecipeError if
    a block has too few channels for a group.
    """
    groups: list[tuple[float, int]] = []
    for block, size_F in enumerate(importances):
        whole = len(size_F) // multiple_of * multiple_of
        if not whole:
            raise RecipeError(
                f"multiple_of={multiple_of} is more than the {len(size_F)} channels of block "
                f"{block}. Lower it."
            )
        best = size_F.sort(descending=True).values[:whole]
        groups += [(float(part.sum()), block) for part in best.split(multiple_of)][1:]
    num_channels = sum(len(size_F) for size_F in importances)
    wanted = round(keep * num_channels / multiple_of) - len(importances)
    sizes = [multiple_of] * len(importances)
    for _, block in sorted(groups, reverse=True)[: max(0, wanted)]:
        sizes[block] += multiple_of
    return tuple(sizes)


def _mlp_sizes(config: DecoderConfig, options: Options) -> tuple[int, ...] | None:
    """Return the widths that the options ask for; None: as they are."""
    sizes = options.intermediate_sizes
    if options.intermediate_size is not None:
        sizes = (options.intermediate_size,) * config.num_layers
    if sizes is None:
        return None
    if len(sizes) != config.num_layers:
        raise RecipeError(
            f"intermediate_sizes has {len(sizes)} widths for {config.num_layers} blocks. Give one "
            "for each."
        )
    for block, (wanted, now) in enumerate(zip(sizes, config.mlp_sizes, strict=True)):
        name = "intermediate_size" if options.intermediate_size is not None else "a width"
        if wanted > now:
            raise RecipeError(
                f"{name}={wanted} is more than the {now} there are in block {block}. Lower it."
            )
        if wanted < _LEAST_WIDTH:
            raise RecipeError(
                f"{name}={wanted} for block {block} is less than {_LEAST_WIDTH}. Raise it."
            )
    return sizes


def _importances(model: Decoder, text_NT: Tensor) -> Iterator[dict[str, Tensor]]:
    """Give the sizes of a block's parts on a text, one block after another."""
    with CalibrationPass(model, text_NT) as text:
        for number in range(model.config.num_layers):
            prefix = f"model.layers.{number}"
            names = {
                "hidden": f"{prefix}.self_attn.q_proj",
                "heads": f"{prefix}.self_attn.o_proj",
                "hidden_mlp": f"{prefix}.mlp.gate_proj",
                "mlp": f"{prefix}.mlp.down_proj",
            }
            seen = text.observe(list(names.values()))
            yield {
                part: (seen[name].mean_abs_I * weight_of(model, name).norm(dim=0)).detach().cpu()
                for part, name in names.items()
            }
            text.advance()


def _narrow_block(block: Block, parts: _Kept, hidden: Tensor, config: DecoderConfig) -> None:
    head_dim, repeats = config.resolved_head_dim, config.num_heads // config.num_kv_heads
    key_rows = _members(parts["heads"], head_dim)
    query_rows = _members(parts["heads"], head_dim * repeats)
    attention, mlp = block.self_attn, block.mlp
    _narrow(attention.q_proj, query_rows, hidden)
    _narrow(attention.k_proj, key_rows, hidden)
    _narrow(attention.v_proj, key_rows, hidden)
    _narrow(attention.o_proj, hidden, query_rows)
    _narrow(mlp.gate_proj, parts["mlp"], hidden)
    _narrow(mlp.up_proj, parts["mlp"], hidden)
    _narrow(mlp.down_proj, hidden, parts["mlp"])
    _narrow(block.input_layernorm, hidden)
    _narrow(block.post_attention_layernorm, hidden)


def _narrow(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep these rows and columns of a module's weight, and these rows of its bias."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter), f"{type(module).__name__} has no weight"
    kept = weight if rows is None else weight[rows.to(weight.device)]
    kept = kept if columns is None else kept[:, columns.to(weight.device)]
    module.weight = nn.Parameter(kept.clone(), requires_grad=weight.requires_grad)
    bias = getattr(module, "bias", None)
    if bias is not None and rows is not None:
        module.bias = nn.Parameter(bias[rows.to(bias.device)].clone(), bias.requires_grad)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = kept.shape


def _largest(sizes: Tensor, count: int) -> Tensor:
    """Return the places of the largest values, in order."""
    return sizes.topk(count).indices.sort().values


def _members(groups: Tensor, size: int) -> Tensor:
    """Return the rows of whole groups of a size."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
