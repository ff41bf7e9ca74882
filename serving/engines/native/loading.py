"""Put a native engine together: from a model directory, or from a model in memory.

Takes a directory or a decoder, and options; gives a running engine. It does not know about Ray or
the registry.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerFast

from cluster.config import parse_config
from cluster.errors import PlacementError
from cluster.storage import MIB
from jobs.compression.packing import load_model
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.kernels.attention import SlotCache
from jobs.kernels.linear import resident_bytes
from jobs.models.decoder import Decoder, stop_token_ids
from serving.engines._protocol import EngineInfo
from serving.engines.native.config import EngineConfig
from serving.engines.native.detokenizer import TextDecoder
from serving.engines.native.engine import NativeEngine
from serving.engines.native.runner import Runner
from serving.engines.native.scheduler import Scheduler


class TokenizerDecoder:
    """A Hugging Face tokenizer as a `TextDecoder`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer

    def decode(self, token_ids: Collection[int]) -> str:
        """Return the text of these tokens, without special ones."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text


def create(directory: Path, options: Mapping[str, Any]) -> NativeEngine:
    """Load a published model, every digest checked, and start an engine.

    Raises ConfigError for a wrong option, ModelFormatError, IntegrityError, TokenizerError, or
    PlacementError if the cache does not fit into memory.
    """
    config = parse_config(EngineConfig, dict(options), "engine options")
    device = _device(config)
    loaded = load_model(directory, dtype=_dtype(config, device), device=str(device))
    tokenizer = load_tokenizer(directory)
    check_fits(tokenizer, loaded.config.vocab_size)
    return start(
        loaded.model,
        config,
        decoder=TokenizerDecoder(tokenizer),
        stop_ids=stop_token_ids(directory, tokenizer.eos_token_id),
        weight_bytes=loaded.weight_bytes,
        schemes=loaded.schemes,
        operators=loaded.operators,
    )


def start(
    model: Decoder,
    config: EngineConfig,
    *,
    decoder: TextDecoder | None = None,
    stop_ids: Collection[int] = (),
    weight_bytes: int | None = None,
    schemes: Mapping[str, str] | None = None,
    operators: Mapping[str, str] | None = None,
) -> NativeEngine:
    """Start an engine over a model in memory, with one cache slot for each running sequence."""
    device = _device(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    max_len = min(config.max_len, model.config.max_seq_len)
    cache = _cache(model, config, max_len, device)
    info = EngineInfo(
        engine="native",
        vocab_size=model.config.vocab_size,
        max_len=max_len,
        max_slots=config.max_slots,
        weight_bytes=resident_bytes(model) if weight_bytes is None else weight_bytes,
        cache_bytes=cache.bytes(),
        schemes=dict(schemes or {}),
        operators=dict(operators or {}),
    )
    return NativeEngine(
        Runner(model, cache, device),
        Scheduler(config.max_slots, max(config.max_batch_tokens, config.max_slots)),
        info,
        decoder=decoder,
        stop_ids=stop_ids,
    )


def _cache(model: Decoder, config: EngineConfig, max_len: int, device: torch.device) -> SlotCache:
    dtype, shape = _dtype(config, device), model.config
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.resolved_head_dim
    needed_bytes = config.max_slots * max_len * token_bytes * dtype.itemsize
    free_bytes = _free_bytes(device)
    if needed_bytes > free_bytes:
        raise PlacementError(
            f"max_slots={config.max_slots} sequences of max_len={max_len} tokens need a cache of "
            f"{needed_bytes / MIB:.0f} MiB; {free_bytes / MIB:.0f} MiB are free. Lower one of them."
        )
    return SlotCache(shape, config.max_slots, max_len, dtype, device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _device(config: EngineConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
