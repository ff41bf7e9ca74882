"""How many cache blocks there is memory for.

Takes an engine's options and a model's shape; gives a number of blocks, or says why there are not
enough. It does not know who will hold them.
"""

from collections.abc import Sequence

import psutil
import torch

from cluster.errors import PlacementError
from cluster.storage import MIB
from jobs.config import DecoderConfig, KvCache
from jobs.kernels.block_cache import BlockCache
from serving.engines._options import EngineOptions, TorchOptions
from serving.engines.native.config import EngineConfig

_SHARE_OF_FREE = 0.5  # The rest is for weights, activations, other replicas and the page cache.


def choose_device(config: TorchOptions) -> torch.device:
    """Return the device that the options name, or the best one."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def activation_dtype(config: TorchOptions, device: torch.device) -> torch.dtype:
    """Return the type of activations."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def cache_dtype(
    config: EngineConfig, device: torch.device, kv_cache: KvCache = "auto"
) -> torch.dtype:
    """Return the type of cached keys and values; `kv_cache` is what the model's directory says."""
    if config.cache_dtype == "auto":
        return torch.int8 if kv_cache == "int8" else activation_dtype(config, device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    return dtypes[config.cache_dtype]


def count_blocks(
    config: EngineConfig,
    shapes: Sequence[DecoderConfig],
    max_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Return how many blocks caches of these shapes, all of one size and type, may have.

    Raises PlacementError if they could not hold one sequence of `max_len` tokens.
    """
    block_bytes = sum(
        BlockCache.bytes_per_block(shape, config.block_size, dtype) for shape in shapes
    )
    sequence_bytes = -(-max_len // config.block_size) * block_bytes
    return grant_bytes(config, sequence_bytes, max_len, device) // block_bytes


def grant_bytes(
    config: EngineOptions, sequence_bytes: int, max_len: int, device: torch.device
) -> int:
    """Return the memory for keys and values where one sequence of `max_len` tokens takes so much.

    Raises PlacementError if there is not that much.
    """
    if config.cache_bytes is not None:
        granted_bytes, source = config.cache_bytes, "`cache_bytes` allows"
    else:
        granted_bytes = min(_usable_bytes(device), config.max_slots * sequence_bytes)
        source = "half of the free memory is"
    if granted_bytes < sequence_bytes:
        raise PlacementError(
            f"one sequence of max_len={max_len} tokens needs a cache of "
            f"{sequence_bytes / MIB:.1f} MiB; {source} {granted_bytes / MIB:.1f} MiB. Lower "
            "`max_len`, choose a smaller type of cache, or give it more memory (`cache_bytes`)."
        )
    return granted_bytes


def _usable_bytes(device: torch.device) -> int:
    """Return how much memory a cache may take on a device now."""
    if device.type == "cuda":
        free_bytes = int(torch.cuda.mem_get_info(device)[0])
    else:
        free_bytes = int(psutil.virtual_memory().available)
    return int(_SHARE_OF_FREE * free_bytes)
