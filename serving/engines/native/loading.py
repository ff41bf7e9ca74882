"""Put a native engine together: from a model directory, or from a model in memory.

Takes a directory or a decoder, and options; gives a running engine. It does not know about Ray or
the registry.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from cluster.config import parse_config
from cluster.errors import ConfigError
from cluster.storage import MIB, verify_directory
from jobs.compression.packing import LoadedModel, load_model
from jobs.config import DecoderConfig
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.kernels import blocks, native
from jobs.kernels.block_cache import BlockCache
from jobs.kernels.linear import resident_bytes
from jobs.models import _hf
from jobs.models._fused import FusedDecoder, can_fuse
from jobs.models.decoder import Decoder, stop_token_ids
from jobs.models.encoder import is_encoder
from serving.engines._protocol import EAGER, EngineInfo
from serving.engines.native.adapters import load_adapters
from serving.engines.native.answers import Vocabulary
from serving.engines.native.blocks import BlockManager
from serving.engines.native.config import DrafterKind, EngineConfig
from serving.engines.native.embedding import NativeEmbedder, create_embedder
from serving.engines.native.engine import NativeEngine
from serving.engines.native.grammar import GrammarCompiler
from serving.engines.native.graphs import CudaRecorder, DecodeGraphs, GraphLimits
from serving.engines.native.memory import (
    activation_dtype,
    cache_dtype,
    choose_device,
    count_blocks,
)
from serving.engines.native.passes import PassLimits
from serving.engines.native.runner import Drafter, Model, Runner
from serving.engines.native.sampling import TokenizerInfo
from serving.engines.native.scheduler import Scheduler
from serving.engines.native.sharing import measured_shared_tokens
from serving.engines.native.speculation import ModelDrafter, NgramDrafter

_logger = logging.getLogger(__name__)


class TokenizerDecoder:
    """A Hugging Face tokenizer as a `TextDecoder`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer

    def decode(self, token_ids: Collection[int]) -> str:
        """Return the text of these tokens, without special ones."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text


def create(directory: Path, options: Mapping[str, Any]) -> NativeEngine | NativeEmbedder:
    """Load a published model, every digest checked, and start an engine.

    An encoder gets an engine that embeds. Raises ConfigError for a wrong option, ModelFormatError,
    IntegrityError, TokenizerError, or PlacementError if the cache does not fit into memory.
    """
    config = parse_config(EngineConfig, dict(options), "engine options")
    verify_directory(directory)
    if is_encoder(_hf.read_config(directory)):
        return create_embedder(directory, config)
    device = choose_device(config)
    dtype = activation_dtype(config, device)
    if config.num_threads is not None:  # Before operators are measured.
        torch.set_num_threads(config.num_threads)
    loaded = load_model(directory, dtype=dtype, device=str(device), verify=False)
    tokenizer = load_tokenizer(directory)
    check_fits(tokenizer, loaded.config.vocab_size)
    stop_ids = stop_token_ids(directory, tokenizer.eos_token_id)
    grammars = GrammarCompiler(tokenizer, loaded.config.vocab_size, stop_ids)
    vocabulary = Vocabulary(
        TokenizerInfo(loaded.config.vocab_size, grammars), TokenizerDecoder(tokenizer), stop_ids
    )
    return start(loaded, config, vocabulary, _load_draft(config, loaded.config, dtype, device))


def start(
    loaded: LoadedModel | Decoder,
    config: EngineConfig,
    vocabulary: Vocabulary | None = None,
    draft: Decoder | None = None,
) -> NativeEngine:
    """Start an engine over a model in memory; without a vocabulary it gives token ids only.

    Raises PlacementError if the cache does not fit into memory, ModelFormatError for an adapter.
    """
    if isinstance(loaded, Decoder):
        loaded = LoadedModel(loaded.eval(), loaded.config, {}, {}, resident_bytes(loaded))
    device = choose_device(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    shape = loaded.config
    max_len = min(config.max_len, shape.max_seq_len)
    shapes = [shape] if draft is None else [shape, draft.config]
    dtype = cache_dtype(config, device, loaded.kv_cache)
    num_blocks = count_blocks(config, shapes, max_len, device, dtype)
    caches = [BlockCache(each, num_blocks, config.block_size, dtype, device) for each in shapes]
    draft_bytes = 0 if draft is None else resident_bytes(draft)
    adapters = load_adapters(config.adapters, shape, device)
    info = EngineInfo(
        engine="native",
        vocab_size=shape.vocab_size,
        max_len=max_len,
        max_slots=config.max_slots,
        weight_bytes=loaded.weight_bytes + adapters.bytes() + draft_bytes,
        cache_bytes=sum(cache.bytes() for cache in caches),
        schemes=dict(loaded.schemes),
        operators=dict(loaded.operators),
        adapters=adapters.names,
    )
    model = _runnable(loaded.model)
    shared_tokens = config.max_shared_tokens
    if shared_tokens == "auto":
        shared_tokens = measured_shared_tokens(model, caches[0], device)
    replays, decoding = _replays(model, caches[0], config, device)
    info = replace(info, decoding=decoding)
    _log(info, shared_tokens)
    drafter = _drafter(draft, config, caches[-1], device)
    return NativeEngine(
        Runner(model, caches[0], device, drafter, adapters, replays),
        _scheduler(config, num_blocks, shared_tokens, is_guessing=drafter is not None),
        info,
        vocabulary or Vocabulary(TokenizerInfo(shape.vocab_size)),
        config.speculation.num_tokens if drafter is not None else 0,
    )


def _scheduler(
    config: EngineConfig, num_blocks: int, shared_tokens: int | None, *, is_guessing: bool
) -> Scheduler:
    limits = PassLimits(
        config.max_slots,
        max(config.max_batch_tokens, config.max_slots),
        shared_tokens,
        config.speculation.max_rows if is_guessing else 0,
    )
    blocks = BlockManager(
        num_blocks, config.block_size, is_prefix_cached=config.enable_prefix_cache
    )
    return Scheduler(limits, blocks)


def _replays(
    model: Model, cache: BlockCache, config: EngineConfig, device: torch.device
) -> tuple[DecodeGraphs | None, str]:
    """Return recordings of decode passes, or None, and which of it in words."""
    if device.type != "cuda":
        return None, EAGER
    if not config.cuda_graphs:
        return None, f"{EAGER} (`cuda_graphs` is off)"
    limits = GraphLimits(config.max_slots, -(-config.max_len // config.block_size))
    graphs = DecodeGraphs(model, cache, limits, device, CudaRecorder(device))
    graphs.prepare()
    if graphs.failure is not None:
        return None, f"{EAGER} ({graphs.failure})"
    return graphs, "CUDA graphs"


def _drafter(
    draft: Decoder | None, config: EngineConfig, cache: BlockCache, device: torch.device
) -> Drafter | None:
    if draft is not None:
        small = _runnable(draft)
        return ModelDrafter(small, cache, device, config.max_batch_tokens)
    return NgramDrafter() if config.speculation.kind is DrafterKind.NGRAM else None


def _load_draft(
    config: EngineConfig, shape: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> Decoder | None:
    if config.speculation.draft is None:
        return None
    draft = load_model(Path(config.speculation.draft), dtype=dtype, device=str(device))
    if draft.config.vocab_size != shape.vocab_size:
        raise ConfigError(
            f"speculation.draft={config.speculation.draft} has a vocabulary of "
            f"{draft.config.vocab_size} tokens, and the model one of {shape.vocab_size}. Give a "
            "small model that was trained with the same tokenizer."
        )
    return draft.model


def _runnable(model: Decoder) -> Model:
    """Return the fastest form of a model: on CPU, by the C++ kernels where they are available."""
    return FusedDecoder(model) if can_fuse(model) else model


def _log(info: EngineInfo, shared_tokens: int | None) -> None:
    layers = Counter((info.schemes.get(name, "?"), op) for name, op in info.operators.items())
    operators = ", ".join(f"{n} x {scheme} on {op}" for (scheme, op), n in layers.most_common())
    _logger.info(
        "native engine: weights %.1f MiB, cache %.1f MiB; decoding: %s; layers: %s; kernels: %s; "
        "tokens of heavy tenants in a light one's pass: %s",
        info.weight_bytes / MIB,
        info.cache_bytes / MIB,
        info.decoding,
        operators or "as they are",
        _kernels(info),
        "any" if shared_tokens is None else shared_tokens,
    )


def _kernels(info: EngineInfo) -> str:
    """Return what the C++ kernels are compiled for, those of int8 rows apart where they differ."""
    name = native.instruction_set() or "none"
    int8_layers = (layer for layer, scheme in info.schemes.items() if scheme in ("w8a8", "w4a8"))
    on_kernels = any(info.operators.get(layer) == blocks.NAME for layer in int8_layers)
    return f"{name}, int8 rows on AMX" if on_kernels and native.has_amx() else name
