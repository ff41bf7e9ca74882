"""Encoders: BERT shapes, from token ids to one vector an input.

Takes sequences of token ids; gives vectors of unit length. Modules and parameters carry Hugging
Face names, and vectors equal sentence-transformers' to float32 rounding. Sequences lie one behind
the other without padding. It does not know how it is compressed, batched or asked: any linear layer
may be replaced by one of another format.

T tokens of all sequences, N sequences, C hidden width, H heads, D size of a head
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from cluster.errors import ModelFormatError
from cluster.storage import GIB
from jobs.kernels.ragged import attend_ragged
from jobs.models import _hf, _weights
from jobs.models._bert import (
    EncoderConfig,
    is_encoder,
    read_encoder_config,
    to_hf_config,
    write_encoder_config,
)

__all__ = [
    "Encoder",
    "EncoderConfig",
    "build",
    "is_encoder",
    "linear_names",
    "load",
    "read_config",
    "read_tensors",
    "save",
]

POOLER = "pooler.dense"
_POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, ...: written by transformers before 4.31.


class Encoder(nn.Module):
    """A sentence encoder whose module tree is that of transformers' `BertModel`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = _Layers(config)
        self.pooler = _Pooler(config) if config.has_pooler else None

    def forward(self, inputs: Sequence[Sequence[int]]) -> Tensor:
        """Return vectors_NC of unit length in float32, one for each non-empty input."""
        device = self.embeddings.word_embeddings.weight.device
        tokens_T = torch.tensor([token for tokens in inputs for token in tokens], device=device)
        lengths = [len(tokens) for tokens in inputs]
        return self.pool(self.hidden(tokens_T, lengths), lengths)

    def hidden(self, tokens_T: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return h_TC after the last block, for sequences of these lengths in order."""
        h_TC = self.embeddings(tokens_T, positions(lengths).to(tokens_T.device))
        for layer in self.encoder.layer:
            h_TC = layer(h_TC, lengths)
        return h_TC

    def pool(self, h_TC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return vectors_NC of unit length in float32 from hidden states."""
        parts = h_TC.float().split(list(lengths))
        if self.config.pooling == "cls":
            pooled_NC = torch.stack([part_TC[0] for part_TC in parts])
        else:
            pooled_NC = torch.stack([part_TC.mean(dim=0) for part_TC in parts])
        return functional.normalize(pooled_NC, dim=-1)


class Embeddings(nn.Module):
    """Sum of a token's, its position's and the first token type's embedding, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.num_positions, size)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, size)
        self.LayerNorm = nn.LayerNorm(size, config.norm_eps)

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """Return h_TC."""
        types_C = self.token_type_embeddings.weight[0]
        h_TC = self.word_embeddings(tokens_T) + self.position_embeddings(positions_T) + types_C
        return self.LayerNorm(h_TC)


class Layer(nn.Module):
    """One block: attention, then a feed-forward layer, each added to the stream and normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config.intermediate_size, config)

    def forward(self, h_TC: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the residual stream h_TC after this block."""
        h_TC = self.attention(h_TC, lengths)
        return self.output(functional.gelu(self.intermediate.dense(h_TC)), h_TC)


class _Layers(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class _Attention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config)
        self.output = _Output(config.hidden_size, config)

    def forward(self, h_TC: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.output(self.self(h_TC, lengths), h_TC)


class _SelfAttention(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = config.head_dim
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)

    def forward(self, h_TC: Tensor, lengths: Sequence[int]) -> Tensor:
        q_THD, k_THD, v_THD = (
            layer(h_TC).unflatten(-1, (-1, self.head_dim))
            for layer in (self.query, self.key, self.value)
        )
        return attend_ragged(q_THD, k_THD, v_THD, lengths).flatten(-2)


class _Intermediate(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class _Output(nn.Module):
    def __init__(self, in_features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x_TI: Tensor, h_TC: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x_TI) + h_TC)


class _Pooler(nn.Module):
    """Held so that what is published is whole for other libraries; vectors do not pass it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


def positions(lengths: Sequence[int]) -> Tensor:
    """Return each token's place within its own sequence, positions_T."""
    return torch.cat([torch.arange(length) for length in lengths])


def build(config: EncoderConfig, seed: int) -> Encoder:
    """Return an encoder with fresh weights that depend on `config` and `seed` alone.

    Normal with `initializer_range`; norms are 1, biases 0.
    """
    with torch.device("meta"):
        model = Encoder(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    """Read a dense Hugging Face or sentence-transformers directory, with weights cast to `dtype`.

    Raises ModelFormatError for an architecture, option or pooling that is not supported, a
    quantized model, and for tensors that are missing, unknown or of the wrong shape.
    """
    if "quantization_config" in _hf.read_config(directory):
        raise ModelFormatError(
            f"{directory} holds a quantized model (quantization_config in {_hf.CONFIG}); dense "
            "weights are needed here. Give the model that it was made from."
        )
    with torch.device("meta"):
        model = Encoder(read_config(directory))
    state = {name: tensor.to(dtype) for name, tensor in read_tensors(directory).items()}
    _weights.check_tensors(
        state, {name: t.shape for name, t in model.state_dict().items()}, directory
    )
    model.load_state_dict(state, assign=True)
    return model


def save(
    model: Encoder,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * GIB,
) -> None:
    """Write a dense directory that transformers and sentence-transformers read; no tokenizer."""
    document = to_hf_config(model.config)
    document["dtype"] = str(dtype).removeprefix("torch.")
    tensors = {name: t.detach().to("cpu", dtype) for name, t in model.state_dict().items()}
    _weights.write_tensors(tensors, directory, max_shard_bytes)
    write_encoder_config(model.config, document, directory)


def read_config(directory: Path) -> EncoderConfig:
    """Return the encoder that a directory holds, dense or compressed; no weights are read.

    Raises ModelFormatError for what is not supported.
    """
    has_pooler = any(name.startswith(POOLER) for name in _weights.tensor_names(directory))
    return read_encoder_config(directory).replace(has_pooler=has_pooler)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the stored tensors by name; raises ModelFormatError where they are unreadable."""
    return {n: t for n, t in _weights.read_tensors(directory) if n != _POSITION_IDS}


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all `nn.Linear` within the blocks (not the pooler), in order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.layer.")
    ]
