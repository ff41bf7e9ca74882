"""C++ attention and elementwise kernels, as functions on tensors.

Takes contiguous float32 tensors on CPU; gives results in new tensors or those handed in. It does
not know about models. Formulas and layouts are explained in csrc/; use it only where
native.is_available().

T tokens, H query heads, K key/value heads, D size of a head, C width, V vocabulary, N rows
"""

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.kernels import native

TILE_ROWS = 64  # attention_tiles.h, kTileRows
MAX_HEAD_DIM = 256  # attention_rows.h, kMaxDim
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_SPAN_FIELDS = 5

_advise_huge_pages = native.function("rs_advise_huge_pages", "pn")
_attend_paged = native.function("rs_attend_paged", "ppnpppnnnppfpi")
_embed = native.function("rs_embed", "pippnni")
_find_best = native.function("rs_find_best", "pppnni")
_rms_norm = native.function("rs_rms_norm", "pppnnnfi")
_silu_mul = native.function("rs_silu_mul", "ppnnnni")


class Pool(ctypes.Structure):
    """Where a cache lies and how it is laid out; rs::Pool of attention.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
    )


class _PassFields(ctypes.Structure):
    """rs::Pass of attention.h."""

    _fields_ = (
        ("tables", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("num_key_tokens", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    )


class Placed(NamedTuple):
    """One span of a pass: its sequence's blocks, and which tokens are computed."""

    blocks: Sequence[int]
    start: int
    length: int


class PagedPass:
    """The spans of one forward pass in the kernel's form; all layers share it."""

    def __init__(self, spans: Sequence[Placed], block_size: int, group: int) -> None:
        """Lay out `spans`; `group` is the number of query heads that share a key head."""
        table_starts, firsts, tiles = [0], [0], [0]
        used = []
        for span in spans:
            blocks = span.blocks[: -(-(span.start + span.length) // block_size)]
            used.append(blocks)
            table_starts.append(table_starts[-1] + len(blocks))
            firsts.append(firsts[-1] + span.length)
            tiles.append(tiles[-1] + -(-span.length * group // TILE_ROWS))
        starts = [*(span.start for span in spans), 0]
        lengths = [*(span.length for span in spans), 0]
        self.num_tokens = firsts[-1]
        self._tables = np.fromiter(chain.from_iterable(used), np.int32, table_starts[-1])
        self._spans = np.array((table_starts, starts, lengths, firsts, tiles), np.int64).T.copy()
        num_key_tokens = sum(map(sum, zip(starts, lengths, strict=True)))
        self._fields = _PassFields(
            self._tables.ctypes.data, self._spans.ctypes.data, len(spans), num_key_tokens
        )
        self._rotation: tuple[Tensor, Tensor] | None = None

    def rotate_by(self, cos_TD: Tensor, sin_TD: Tensor) -> None:
        """Rotate queries and keys of every call from now on; the tables hold half a head's size."""
        self._rotation = (cos_TD, sin_TD)  # Kept: the kernel reads their memory.
        self._fields.cos, self._fields.sin = cos_TD.data_ptr(), sin_TD.data_ptr()

    @property
    def address(self) -> int:
        """Where the kernel's form lies; valid as long as this object."""
        return ctypes.addressof(self._fields)


def attend_paged(
    pool: Pool,
    step: PagedPass,
    layer: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    out_THD: Tensor,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
) -> None:
    """Write keys and values of a pass into a cache, then what every query attends to into `out`.

    `qkv` are q_THD, k_TKD and v_TKD; heads must lie behind one another, tokens any stride apart.
    With `norms`, RMSNorm weights [D] and `eps`, each head of q and k is normalised first.
    """
    q_THD, k_TKD, v_TKD = qkv
    _attend_paged(
        ctypes.addressof(pool),
        step.address,
        layer,
        *(x.data_ptr() for x in qkv),
        *(x.stride(0) for x in (q_THD, k_TKD, v_TKD)),
        *map(native.address, norms),
        eps,
        out_THD.data_ptr(),
        native.num_threads(),
    )


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask for large pages for memory that was not written yet: it will be read all over."""
    _advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def embed(embedding_VC: Tensor, tokens_T: Tensor, out_TC: Tensor) -> None:
    """Write embedding[tokens] in float32; the embedding is float32 or bfloat16, tokens int64."""
    is_half = embedding_VC.dtype == torch.bfloat16
    _embed(
        embedding_VC.data_ptr(),
        int(is_half),
        tokens_T.data_ptr(),
        out_TC.data_ptr(),
        *out_TC.shape,
        native.num_threads(),
    )


def rms_norm(x_NC: Tensor, weight_C: Tensor, out_NC: Tensor, eps: float) -> None:
    """Write weight * x / rms(x) for every row."""
    _rms_norm(
        x_NC.data_ptr(),
        weight_C.data_ptr(),
        out_NC.data_ptr(),
        *x_NC.shape,
        x_NC.stride(0),
        eps,
        native.num_threads(),
    )


def silu_mul(gate_up_NC: Tensor, out_NC: Tensor) -> None:
    """Write silu(gate) * up, where the first half of a row is the gate and the second is up.

    `out` may be the first half itself.
    """
    num_rows, width = out_NC.shape
    strides = (gate_up_NC.stride(0), out_NC.stride(0))
    _silu_mul(
        gate_up_NC.data_ptr(), out_NC.data_ptr(), num_rows, width, *strides, native.num_threads()
    )


def find_best(x_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of each row and its lowest place; NaN is larger than any number."""
    best_N = torch.empty(len(x_NV))
    ids_N = torch.empty(len(x_NV), dtype=torch.int64)
    pointers = (x_NV.data_ptr(), best_N.data_ptr(), ids_N.data_ptr())
    _find_best(*pointers, *x_NV.shape, native.num_threads())
    return best_N, ids_N


def pool_of(shape: dict[str, int], keys: Tensor, values: Tensor, scales: Tensor | None) -> Pool:
    """Return a cache's tensors in the kernel's form; the tensors must outlive it."""
    fields: dict[str, Any] = {
        "keys": keys.data_ptr(),
        "values": values.data_ptr(),
        "scales": native.address(scales),
        "type": CACHE_TYPES[keys.dtype],
        **shape,
    }
    return Pool(**fields)
