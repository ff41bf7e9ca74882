"""Put a vLLM engine together from a model directory.

Takes a directory and options; gives a running engine. It does not know about Ray or the registry.
vLLM is imported here, when an engine is asked for, and nowhere before.
"""

import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from cluster.config import parse_config
from cluster.errors import ConfigError, ModelFormatError
from cluster.storage import verify_directory
from jobs.data.tokenizer import check_fits, load_tokenizer
from jobs.kernels.build import cpu_flags
from jobs.kernels.formats import GROUPED
from jobs.models import _hf
from serving.engines import _published
from serving.engines._protocol import MAX_LOGPROBS, Engine, EngineInfo
from serving.engines.native.answers import Vocabulary
from serving.engines.native.loading import TokenizerDecoder
from serving.engines.native.memory import grant_bytes
from serving.engines.native.sampling import TokenizerInfo
from serving.engines.vllm.config import VllmConfig
from serving.engines.vllm.cpu import why_not

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Without these vLLM would report home, and fork a process that has threads.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def create(directory: Path, options: Mapping[str, Any]) -> Engine:
    """Check a published model, every digest, and start vLLM over it.

    Raises ConfigError for a wrong option, where vLLM is not installed and for what it does not
    compute on this CPU, IntegrityError, TokenizerError, ModelFormatError, PlacementError if one
    sequence does not fit into memory, and EngineError if vLLM does not start.
    """
    config = parse_config(VllmConfig, dict(options), "engine options")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine `vllm` needs vLLM, which is not installed. Make an environment of its own with "
            "`pip install -e '.[vllm]'` in a checkout, since vLLM chooses PyTorch's version, or "
            "choose engine `native` or `transformers`."
        )
    verify_directory(directory)
    tokenizer = load_tokenizer(directory)
    shape, schemes = _shape(directory), _published.schemes(directory)
    _check_schemes(config, schemes)
    _check_cache(directory)
    _check_cpu(schemes)
    check_fits(tokenizer, shape.vocab_size)
    max_len = min(config.max_len, getattr(shape, "max_position_embeddings", config.max_len))
    cache_bytes = _cache_bytes(config, shape, max_len)
    vocabulary = Vocabulary(
        TokenizerInfo(shape.vocab_size),
        TokenizerDecoder(tokenizer),
        _hf.stop_token_ids(directory, tokenizer.eos_token_id),
    )
    info = EngineInfo(
        engine="vllm",
        vocab_size=shape.vocab_size,
        max_len=max_len,
        max_slots=config.max_slots,
        weight_bytes=_published.weight_bytes(directory),
        cache_bytes=cache_bytes or 0,
        schemes=schemes,
        operators={"model": "vllm"},
        adapters=tuple(config.adapters),
    )
    return _start(directory, config, info, vocabulary)


def _start(directory: Path, config: VllmConfig, info: EngineInfo, vocabulary: Vocabulary) -> Engine:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Only here: importing vLLM takes seconds, reads the environment, and it may not be installed.
    from vllm import AsyncEngineArgs
    from vllm.config import StructuredOutputsConfig
    from vllm.lora.request import LoRARequest

    from serving.engines.vllm.engine import VllmEngine

    arguments = AsyncEngineArgs(
        model=str(directory),
        dtype="bfloat16" if config.dtype == "auto" else config.dtype,
        max_model_len=info.max_len,
        max_num_seqs=config.max_slots,
        max_num_batched_tokens=max(config.max_batch_tokens, config.max_slots),
        kv_cache_memory_bytes=info.cache_bytes or None,
        enable_prefix_caching=config.enable_prefix_cache,
        tensor_parallel_size=config.tensor_parallel,
        enforce_eager=config.enforce_eager,
        max_logprobs=MAX_LOGPROBS,
        generation_config="vllm",  # Defaults of sampling are the request's, not the model's.
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        disable_log_stats=True,
        **_lora_arguments(config.adapters),
    )
    adapters = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(config.adapters.items(), start=1)
    }
    return VllmEngine(arguments, info, vocabulary, adapters)


def _shape(directory: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise ModelFormatError(f"{directory}: its config.json cannot be read: {error}") from error
    return config.get_text_config()


def _check_cpu(schemes: Mapping[str, str]) -> None:
    flags = cpu_flags()
    if torch.cuda.is_available() or platform.machine() != "x86_64" or not flags:
        return
    if reason := why_not(set(schemes.values()), flags):
        raise ConfigError(
            f"engine `vllm` does not run this model here: {reason}. Choose engine `native`, or a "
            "machine with AVX-512 VNNI or a GPU."
        )


def _check_cache(directory: Path) -> None:
    # vLLM 0.32: CompressedTensorsKVCacheMethod.validate_kv_cache_scheme takes floats only.
    if _published.kv_cache(directory) == "int8":
        raise ConfigError(
            "vLLM reads no int8 `kv_cache_scheme`, which this model has. Choose engine `native`, "
            "or compress the dense model again with `recipe.kv_cache` = auto."
        )


def _check_schemes(config: VllmConfig, schemes: Mapping[str, str]) -> None:
    # vLLM 0.32 reads 3-bit weights, but of its mixed-precision kernels only Humming's takes them;
    # that for CPUs (CPUWNA16) takes 4-bit weights alone.
    has_gpu = torch.cuda.is_available()
    has_kernel = {
        "w3a16": has_gpu and importlib.util.find_spec("humming") is not None,
        "w8a16": has_gpu,
    }
    for scheme in (scheme for scheme, found in has_kernel.items() if not found):
        if layers := [name for name, s in schemes.items() if s == scheme]:
            raise ConfigError(
                f"vLLM has no kernel for {scheme} here, which {len(layers)} layers of this model "
                f"have, `{layers[0]}` among them. Choose engine `native`, or compress to w4a16."
            )
    if config.dtype == "float32" and any(scheme in GROUPED for scheme in schemes.values()):
        raise ConfigError(
            "vLLM computes layers of w8a16, w4a16, w4a8 and w3a16 in bfloat16 only. Set `dtype` to "
            "bfloat16."
        )


def _cache_bytes(config: VllmConfig, shape: PretrainedConfig, max_len: int) -> int | None:
    """Return the memory for keys and values, None to let vLLM decide (on a GPU)."""
    if config.cache_bytes is None and torch.cuda.is_available():
        return None
    num_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    itemsize = 4 if config.dtype == "float32" else 2
    block_bytes = 128 * 2 * shape.num_hidden_layers * num_heads * head_dim * itemsize
    sequence_bytes = (-(-max_len // 128) + 1) * block_bytes
    return grant_bytes(config, sequence_bytes, max_len, torch.device("cpu"))


def _lora_arguments(adapters: Mapping[str, str]) -> dict[str, Any]:
    if not adapters:
        return {}
    largest = max(_rank(name, Path(path)) for name, path in adapters.items())
    if largest > _LORA_RANKS[-1]:
        raise ConfigError(f"vLLM runs adapters of rank {_LORA_RANKS[-1]} at most, not {largest}.")
    rank = next(rank for rank in _LORA_RANKS if rank >= largest)
    # One place more than is ever taken: vLLM 0.32 on CPUs adds what is in the last to sequences
    # without an adapter (lora/ops/torch_ops: an index of -1), so it must stay empty.
    return {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": rank}


def _rank(name: str, directory: Path) -> int:
    path = directory / "adapter_config.json"
    try:
        return int(json.loads(path.read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFormatError(f"adapter `{name}`: {path} cannot be read: {error}") from None
