"""Width pruning: leave out channels of the MLPs, heads and hidden channels that matter least.

Takes a decoder and text; gives a decoder of a narrower shape, the same for every block, whose
weights are those of what stays. How much a part matters is how large what it gives is: the mean
size of its values on the text times the size of the weights that read them. A repair step
afterwards teaches it to do without the rest.

Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), 2024, section 2.2.

H query heads, K key/value heads, D size of a head, C hidden width, F width of an MLP
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from cluster.config import StrictModel
from cluster.errors import RecipeError
from jobs.compression.calibration import CalibrationPass
from jobs.compression.layers import weight_of
from jobs.config import DecoderConfig
from jobs.kernels.formats import Layout
from jobs.models.decoder import Block, Decoder

_Kept = dict[str, Tensor]


class Options(StrictModel):
    """What stays; unset: all of it."""

    intermediate_size: int | None = Field(None, ge=8, description="Channels of an MLP that stay.")
    num_kv_heads: int | None = Field(
        None, ge=1, description="Key and value heads that stay, with the query heads that use them."
    )
    hidden_size: int | None = Field(None, ge=8, description="Hidden channels that stay.")


def layout(options: Options) -> Layout | None:
    """Return None: what stays is stored as it was."""
    return None


def reshape(config: DecoderConfig, options: Options) -> DecoderConfig:
    """Return the narrower configuration."""
    changes: dict[str, int] = {}
    for name in ("intermediate_size", "num_kv_heads", "hidden_size"):
        wanted, now = getattr(options, name), getattr(config, name)
        if wanted is None:
            continue
        if wanted > now:
            raise RecipeError(f"{name}={wanted} is more than the {now} there are. Lower it.")
        changes[name] = wanted
    if not changes:
        raise RecipeError(
            "nothing would be left out. Give intermediate_size, num_kv_heads or hidden_size."
        )
    if options.num_kv_heads is not None:
        changes["num_heads"] = config.num_heads // config.num_kv_heads * options.num_kv_heads
    return config.replace(head_dim=config.resolved_head_dim, **changes)


def cut(model: Decoder, text_NT: Tensor, options: Options) -> None:
    """Keep what matters most of every kind, in its old order."""
    config = reshape(model.config, options)
    hidden_C = torch.zeros(model.config.hidden_size)
    kept: list[_Kept] = []
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
            sizes = {
                part: (seen[name].mean_abs_I * weight_of(model, name).norm(dim=0)).detach().cpu()
                for part, name in names.items()
            }
            hidden_C += sizes["hidden"] + sizes["hidden_mlp"]
            heads_K = sizes["heads"].view(model.config.num_kv_heads, -1).sum(dim=1)
            kept.append(
                {
                    "heads": _largest(heads_K, config.num_kv_heads),
                    "mlp": _largest(sizes["mlp"], config.intermediate_size),
                }
            )
            text.advance()
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
