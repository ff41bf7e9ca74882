"""Put a transformers engine together from a model directory.

Takes a directory and options; gives a running engine. It does not know about Ray or the registry.
"""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.logging import disable_progress_bar

from cluster.config import parse_config
from cluster.errors import EngineError, ModelFormatError
from cluster.storage import verify_directory
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.models import _hf
from serving.engines import _published
from serving.engines._protocol import EngineInfo
from serving.engines.native.answers import Vocabulary
from serving.engines.native.blocks import BlockManager
from serving.engines.native.engine import NativeEngine
from serving.engines.native.grammar import GrammarCompiler
from serving.engines.native.loading import TokenizerDecoder
from serving.engines.native.memory import activation_dtype, choose_device, grant_bytes
from serving.engines.native.passes import PassLimits
from serving.engines.native.sampling import TokenizerInfo
from serving.engines.native.scheduler import Scheduler
from serving.engines.transformers.adapters import Adapters
from serving.engines.transformers.config import TransformersConfig
from serving.engines.transformers.rows import Rows
from serving.engines.transformers.runner import TransformersRunner

_logger = logging.getLogger(__name__)
_BLOCK_SIZE = 16
_JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer)
_PROBE = (2, 1, 0, 1, 1)
_TOLERANCE = 0.02


def create(directory: Path, options: Mapping[str, Any]) -> NativeEngine:
    """Load a published model, every digest checked, and start an engine.

    Raises ConfigError for a wrong option, ModelFormatError for what transformers cannot load,
    IntegrityError, TokenizerError, PlacementError if one sequence does not fit into memory, and
    EngineError for an architecture whose cache transformers does not continue exactly.
    """
    config = parse_config(TransformersConfig, dict(options), "engine options")
    verify_directory(directory)
    device = choose_device(config)
    _published.kv_cache(directory)  # transformers rounds as any scheme says; only ours is tested.
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    model = _load(directory, config, device)
    tokenizer = load_tokenizer(directory)
    shape = model.config.get_text_config()
    check_fits(tokenizer, shape.vocab_size)
    max_len = min(config.max_len, getattr(shape, "max_position_embeddings", config.max_len))
    is_joinable = _is_joinable(model)
    block_bytes = _BLOCK_SIZE * _probe(model, is_joinable=is_joinable)
    num_blocks = _count_blocks(config, max_len, block_bytes, device)
    runner = TransformersRunner(
        Rows(model, is_joinable=is_joinable), Adapters(model, config.adapters)
    )
    num_slots = count_slots(config, num_blocks, max_len)
    limits = PassLimits(num_slots, max(config.max_batch_tokens, num_slots))
    blocks = BlockManager(num_blocks, _BLOCK_SIZE, is_prefix_cached=False)
    info = EngineInfo(
        engine="transformers",
        vocab_size=shape.vocab_size,
        max_len=max_len,
        max_slots=num_slots,
        weight_bytes=_published.weight_bytes(directory),
        cache_bytes=num_blocks * block_bytes,
        schemes=_published.schemes(directory),
        operators={"model": f"transformers {transformers.__version__}"},
        adapters=tuple(config.adapters),
    )
    vocabulary = _vocabulary(directory, tokenizer, shape)
    return NativeEngine(runner, Scheduler(limits, blocks), info, vocabulary)


def _load(directory: Path, config: TransformersConfig, device: torch.device) -> PreTrainedModel:
    dtype = activation_dtype(config, device)
    disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelFormatError(f"{directory}: transformers cannot load it: {error}") from error
    return model.to(device).eval()


def _vocabulary(
    directory: Path, tokenizer: PreTrainedTokenizerFast, shape: PretrainedConfig
) -> Vocabulary:
    stop_ids = _hf.stop_token_ids(directory, tokenizer.eos_token_id)
    grammars = GrammarCompiler(tokenizer, shape.vocab_size, stop_ids)
    return Vocabulary(
        TokenizerInfo(shape.vocab_size, grammars), TokenizerDecoder(tokenizer), stop_ids
    )


def _count_blocks(
    config: TransformersConfig, max_len: int, block_bytes: int, device: torch.device
) -> int:
    """Return for how many blocks of tokens there is memory."""
    sequence_bytes = -(-max_len // _BLOCK_SIZE) * block_bytes
    return grant_bytes(config, sequence_bytes, max_len, device) // block_bytes


def count_slots(config: TransformersConfig, num_blocks: int, max_len: int) -> int:
    """Return how many sequences may run: each takes what the longest of its batch does."""
    num_slots = min(config.max_slots, num_blocks // -(-max_len // _BLOCK_SIZE))
    if num_slots < config.max_slots:
        _logger.warning(
            "there is memory for %d sequences of %d tokens: `max_slots` = %d is lowered to that",
            num_slots,
            max_len,
            config.max_slots,
        )
    return num_slots


def _is_joinable(model: PreTrainedModel) -> bool:
    """Return whether a cache of this model is keys and values of tokens, and nothing else."""
    return all(type(layer) in _JOINABLE for layer in DynamicCache(config=model.config).layers)


@torch.inference_mode()
def _probe(model: PreTrainedModel, *, is_joinable: bool) -> int:
    """Return the bytes that one token takes in the cache.

    Raises EngineError unless a few tokens read in parts give what they give at once.
    """
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise EngineError(f"{name} keeps its past in a form of its own, which is not supported.")
    rows = Rows(model, is_joinable=is_joinable)
    rows.begin("short", _PROBE[:1])
    rows.begin("long", _PROBE[:2])
    rows.extend("long", _PROBE[2:4])
    found_V = rows.step(["short", "long"], [_PROBE[1], _PROBE[4]])[1]
    tokens_BT = torch.tensor([_PROBE], device=model.device)
    expected_V = model(input_ids=tokens_BT, use_cache=False).logits[0, -1].float()
    error = float((found_V - expected_V).abs().max() / expected_V.abs().max().clamp_min(1e-6))
    if not error <= _TOLERANCE:
        raise EngineError(
            f"{name} continued from its cache differs from itself at once by {error:.1%} of the "
            "largest logit. Use another engine for this architecture."
        )
    return rows.bytes_per_token("long")
