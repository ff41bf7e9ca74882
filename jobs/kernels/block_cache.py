"""Keys and values of many sequences in one pool of blocks, and attention over it.

Takes the pieces of sequences that a forward pass computes, each with the blocks its sequence lives
in; gives the attention of that pass. Who gets which block, and which blocks sequences share, is
the caller's: blocks that are only read may be in any number of spans. On a CPU with the C++ kernels
a token's result does not depend on what else is in the pass, to the last bit.

T tokens of the pass (B = 1), H query heads, K key/value heads, D size of a head, O outputs of a row
"""

import ctypes
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.config import DecoderConfig
from jobs.kernels import native, native_ops
from jobs.kernels.attention import Attention
from jobs.kernels.block_pool import BlockPool
from jobs.kernels.decode_attention import DecodeAttention
from jobs.kernels.gathered_attention import BlockSpan, GatheredAttention

__all__ = ["BlockCache", "BlockSpan", "PagedAttention"]

_logger = logging.getLogger(__name__)
_LANES = 16
_MAX_KERNEL_BLOCK_SIZE = 512


class BlockCache:
    """A pool of blocks, each with the keys and values of `block_size` tokens in all layers.

    In int8 every token and key/value head has a scale of its own. A block needs no clearing: what
    lies behind a span's end is never read.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        use_kernels: bool | None = None,
    ) -> None:
        """Allocate the pool; `use_kernels` is for tests: unset, C++ where it can run."""
        assert num_blocks > 0, f"num_blocks={num_blocks} must be positive"
        assert block_size > 0, f"block_size={block_size} must be positive"
        assert dtype in native_ops.CACHE_TYPES, f"no cache holds {dtype}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._config = config
        if use_kernels is None:
            use_kernels = torch.device(device).type == "cpu" and _kernels_take(config, block_size)
        head_dim = config.resolved_head_dim
        slots = _padded(block_size) if use_kernels else block_size
        cells = (config.num_layers, num_blocks, config.num_kv_heads)
        key_shape = (head_dim, slots) if use_kernels else (slots, head_dim)
        value_shape = (slots, _padded(head_dim)) if use_kernels else (slots, head_dim)
        self._keys = _zeros((*cells, *key_shape), dtype, device)
        self._values = _zeros((*cells, *value_shape), dtype, device)
        is_scaled = dtype == torch.int8
        self._scales = _zeros((2, *cells, slots), torch.float32, device) if is_scaled else None
        self._tensors = BlockPool(self._keys, self._values, self._scales)
        self._pool = self._describe() if use_kernels else None

    @staticmethod
    def bytes_per_block(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block in all layers.

        Counts what the C++ kernels fill up: block and head sizes that are no multiples of 16.
        """
        slots, head_dim = _padded(block_size), config.resolved_head_dim
        cell_bytes = slots * (head_dim + _padded(head_dim)) * dtype.itemsize
        if dtype == torch.int8:
            cell_bytes += 2 * slots * torch.float32.itemsize
        return config.num_layers * config.num_kv_heads * cell_bytes

    def bytes(self) -> int:
        """Return the memory held, in bytes."""
        scale_bytes = 0 if self._scales is None else self._scales.nbytes
        return self._keys.nbytes + self._values.nbytes + scale_bytes

    def attention(self, spans: Sequence[BlockSpan]) -> Attention:
        """Return attention for one forward pass over `spans`, concatenated in this order (B = 1).

        Every call writes the spans' keys and values, then each span attends to its own sequence
        from the beginning. No block that a span writes may be in another span.
        """
        assert spans, "a forward pass needs at least one span"
        for span in spans:
            self._check(span)
        if self._pool is not None:
            return PagedAttention(self._pool, spans)
        window = self._config.sliding_window
        return GatheredAttention(self._tensors, spans, window)

    def decode_attention(self, blocks_NP: Tensor, positions_N: Tensor) -> DecodeAttention:
        """Return attention of a pass that reads one token of each sequence; see there.

        Not where the C++ kernels run: they need no fixed shapes.
        """
        assert self._pool is None, "the C++ kernels take spans"
        return DecodeAttention(self._tensors, blocks_NP, positions_N, self._config.sliding_window)

    def _describe(self) -> native_ops.Pool:
        config = self._config
        shape = {
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.resolved_head_dim,
            "window": config.sliding_window or 0,
        }
        return native_ops.pool_of(shape, self._keys, self._values, self._scales)

    def _check(self, span: BlockSpan) -> None:
        assert span.start >= 0, f"{span}: start must not be negative"
        assert span.length > 0, f"{span}: length must be positive"
        held = len(span.blocks) * self.block_size
        assert span.stop <= held, f"{span}: its blocks hold {held} tokens"
        assert min(span.blocks) >= 0, f"{span}: block numbers must not be negative"
        assert max(span.blocks) < self.num_blocks, f"{span}: there are {self.num_blocks} blocks"


class PagedAttention:
    """Attention of one forward pass by the C++ kernel, over blocks where they lie."""

    def __init__(self, pool: native_ops.Pool, spans: Sequence[BlockSpan]) -> None:
        self._pool = pool
        self._heads = (pool.num_heads, pool.num_kv_heads, pool.num_kv_heads)
        placed = [native_ops.Placed(span.blocks, span.start, span.length) for span in spans]
        group = pool.num_heads // pool.num_kv_heads
        self._step = native_ops.PagedPass(placed, pool.block_size, group)

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """Return o_BTHD for block number `layer`, of rotated queries and keys."""
        expected = self._step.num_tokens
        assert q_BTHD.shape[:2] == (1, expected), (
            f"expected 1 x {expected} tokens, found {tuple(q_BTHD.shape[:2])}"
        )
        q_THD, k_TKD, v_TKD = (x[0].float().contiguous() for x in (q_BTHD, k_BTKD, v_BTKD))
        o_THD = torch.empty_like(q_THD)
        native_ops.attend_paged(self._pool, self._step, layer, (q_THD, k_TKD, v_TKD), o_THD)
        return o_THD[None].to(q_BTHD.dtype)

    def addresses(self) -> tuple[int, int]:
        """Return where the pool and the pass lie as the kernels read them, while this object is."""
        return ctypes.addressof(self._pool), self._step.address

    def rotate_by(self, cos_TD: Tensor, sin_TD: Tensor) -> None:
        """Give the angles that `attend_rows` rotates queries and keys by, float32 [T, D / 2]."""
        assert cos_TD.shape == sin_TD.shape == (self._step.num_tokens, self._pool.head_dim // 2)
        self._step.rotate_by(cos_TD, sin_TD)

    def attend_rows(
        self,
        layer: int,
        qkv_TO: Tensor,
        out_TO: Tensor,
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        eps: float = 0.0,
    ) -> None:
        """Write what every token attends to into `out`, from raw q, k and v of a row side by side.

        Heads are normalised by RMSNorm with these weights of q and k first, if given, then rotated.
        """
        sizes = [heads * self._pool.head_dim for heads in self._heads]
        q_TO, k_TO, v_TO = qkv_TO.split(sizes, dim=1)
        native_ops.attend_paged(
            self._pool, self._step, layer, (q_TO, k_TO, v_TO), out_TO, norms, eps
        )


def _kernels_take(config: DecoderConfig, block_size: int) -> bool:
    if not native.is_available():
        return False
    head_dim = config.resolved_head_dim
    if head_dim > native_ops.MAX_HEAD_DIM or block_size > _MAX_KERNEL_BLOCK_SIZE:
        _logger.warning(
            "attention runs on PyTorch's operators: the C++ kernel takes heads of up to %d and "
            "blocks of up to %d tokens, not %d and %d",
            native_ops.MAX_HEAD_DIM,
            _MAX_KERNEL_BLOCK_SIZE,
            head_dim,
            block_size,
        )
        return False
    return True


def _padded(size: int) -> int:
    return -(-size // _LANES) * _LANES


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return zeros that are in memory from now on, in large pages where that can be asked for."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and native.is_available():
        native_ops.advise_huge_pages(tensor)
    return tensor.zero_()
