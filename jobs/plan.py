"""What a training run asks for, from its configuration: parameters, tokens, workers.

Takes a TrainConfig; gives a TrainingDemand for cluster/planner.py. It reads a model's config.json
when training starts from a directory, and otherwise nothing; no torch.
"""

from cluster.demand import LayerShape, TrainingDemand
from cluster.errors import ConfigError
from cluster.storage import find_input
from jobs.config import DecoderConfig, TrainConfig
from jobs.models import _hf


def training_demand(config: TrainConfig) -> TrainingDemand:
    """Return what a run asks for.

    Raises ModelFormatError if `model.init_from` is no supported model, ConfigError if sequences are
    longer than the model's positions.
    """
    decoder = resolve_decoder(config)
    if config.seq_len > decoder.max_seq_len:
        raise ConfigError(
            f"seq_len={config.seq_len} exceeds the {decoder.max_seq_len} positions of "
            f"model.init_from={config.model.init_from}. Lower seq_len."
        )
    window = decoder.sliding_window or config.seq_len
    passes = config.max_steps // config.eval_every_steps + 1
    return TrainingDemand(
        name=config.name,
        parameters=count_parameters(decoder),
        matmul_parameters=count_matmul_parameters(decoder),
        layer=LayerShape(
            hidden=decoder.hidden_size,
            query=decoder.num_heads * decoder.resolved_head_dim,
            key=decoder.num_kv_heads * decoder.resolved_head_dim,
            intermediate=decoder.intermediate_size,
            num_heads=decoder.num_heads,
        ),
        num_layers=decoder.num_layers,
        vocab_size=decoder.vocab_size,
        seq_len=config.seq_len,
        attention_span=min(window, config.seq_len),
        micro_batch_size=config.micro_batch_size,
        tokens_per_step=config.global_batch_size * config.seq_len,
        steps=config.max_steps,
        eval_tokens=passes * config.eval_sequences * config.seq_len,
        precision=config.precision,
        num_workers=config.scaling.num_workers,
        cpus_per_worker=config.scaling.cpus_per_worker,
        gpus_per_worker=config.scaling.gpus_per_worker,
        compiled=config.compile,
    )


def resolve_decoder(config: TrainConfig) -> DecoderConfig:
    """Return the shape that is trained: a fresh one, or that of the directory to start from."""
    if config.model.init_from is None:
        return config.model.decoder
    return _hf.from_hf_config(_hf.read_config(find_input(config.model.init_from)))


def count_parameters(decoder: DecoderConfig) -> int:
    """Return the number of weights; a tied embedding counts once."""
    embedding = decoder.vocab_size * decoder.hidden_size
    tied = 1 if decoder.tie_embeddings else 2
    return tied * embedding + _blocks(decoder) + decoder.hidden_size


def count_matmul_parameters(decoder: DecoderConfig) -> int:
    """Return the weights that each token is multiplied by: linear layers and the output head."""
    head = decoder.vocab_size * decoder.hidden_size
    return head + _linears(decoder)


def _linears(decoder: DecoderConfig) -> int:
    """Weights of the linear layers of all blocks: attention and MLPs."""
    query = decoder.num_heads * decoder.resolved_head_dim
    key = decoder.num_kv_heads * decoder.resolved_head_dim
    attention = decoder.num_layers * (2 * query + 2 * key)
    return decoder.hidden_size * (attention + 3 * sum(decoder.mlp_sizes))


def _blocks(decoder: DecoderConfig) -> int:
    query = decoder.num_heads * decoder.resolved_head_dim
    key = decoder.num_kv_heads * decoder.resolved_head_dim
    biases = query + 2 * key if decoder.has_qkv_bias else 0
    head_norms = 2 * decoder.resolved_head_dim if decoder.has_qk_norm else 0
    return _linears(decoder) + decoder.num_layers * (2 * decoder.hidden_size + biases + head_norms)
