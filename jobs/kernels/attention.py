"""Causal attention: whole sequences for training, and a cache of keys and values for generation.

Takes rotated queries, keys and values; gives what each query attends to. It does not know about
projections, positions or sampling.

B batch, T tokens, H query heads, K key/value heads, G = H / K queries that share a key, D size of a
head, L cached tokens, N sequences that decode one token, S slots
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from jobs.config import DecoderConfig
from jobs.kernels.blocked_attention import attend_blocked


class Attention(Protocol):
    """What a decoder calls in every block: mixes values by how well keys match queries."""

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """Return o_BTHD for block number `layer`."""
        ...


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of the sequence that lives in `slot`."""

    slot: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """Number of tokens that the slot holds once the span is written."""
        return self.start + self.length


def attend_causal(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int | None) -> Tensor:
    """Return o_BTHD where token t attends to itself and those before it, at most `window` of them.

    Keys are shared by groups of query heads when H is a multiple of K.
    """
    length = q_BTHD.shape[1]
    q_BHTD, k_BKTD, v_BKTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    if q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16:
        return attend_blocked(q_BHTD, k_BKTD, v_BKTD, window).transpose(1, 2)
    mask_TT = None
    if window is not None and window < length:
        positions_T = torch.arange(length, device=q_BTHD.device)
        mask_TT = _visible(positions_T, positions_T, window)
    o_BHTD = functional.scaled_dot_product_attention(
        q_BHTD, k_BKTD, v_BKTD, attn_mask=mask_TT, is_causal=mask_TT is None, enable_gqa=True
    )
    return o_BHTD.transpose(1, 2)


class SlotCache:
    """Keys and values of up to `num_slots` sequences, one contiguous slot each.

    Slots are the caller's to hand out; neighbouring slots decode fastest, because their keys are
    then read in place instead of being gathered. A slot needs no clearing: a span that starts at 0
    begins a new sequence, and what lies behind a span's end is never read.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        assert num_slots > 0, f"num_slots={num_slots} must be positive"
        assert max_len > 0, f"max_len={max_len} must be positive"
        self.num_slots = num_slots
        self.max_len = max_len
        self._window = config.sliding_window
        shape = (
            config.num_layers,
            num_slots,
            config.num_kv_heads,
            max_len,
            config.resolved_head_dim,
        )
        # Zeros, not empty: masked positions are multiplied by a weight of 0, and 0 x NaN is NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def bytes(self) -> int:
        """Return the memory held, in bytes."""
        return self._keys.nbytes + self._values.nbytes

    def attention(self, spans: Sequence[Span]) -> Attention:
        """Return attention for one forward pass over `spans`, concatenated in this order (B = 1).

        Every call writes the spans' keys and values, then each span attends to its own slot from
        the sequence's beginning. Spans of one token are computed together, in one call.
        """
        for span in spans:
            assert 0 <= span.slot < self.num_slots, f"{span}: there are {self.num_slots} slots"
            assert span.start >= 0, f"{span}: start must not be negative"
            assert span.length > 0, f"{span}: length must be positive"
            assert span.stop <= self.max_len, f"{span}: a slot holds {self.max_len} tokens"
        assert spans, "a forward pass needs at least one span"
        assert len({span.slot for span in spans}) == len(spans), "a slot appears in two spans"
        return _CachedAttention(self._keys, self._values, spans, self._window)


class _CachedAttention:
    """Attention of one forward pass; everything that all layers share is computed once."""

    def __init__(
        self, keys: Tensor, values: Tensor, spans: Sequence[Span], window: int | None
    ) -> None:
        self._keys, self._values = keys, values
        device = keys.device
        self._num_tokens = sum(span.length for span in spans)
        offsets = [0]
        for span in spans:
            offsets.append(offsets[-1] + span.length)
        placed = list(zip(spans, offsets, strict=False))
        self._prefills = [
            (span, offset, _prefill_mask(span, window, device), _first_visible(span, window))
            for span, offset in placed
            if span.length > 1
        ]
        decodes = sorted((s.slot, s.start, offset) for s, offset in placed if s.length == 1)
        self._decode = _DecodeBatch(decodes, window, device) if decodes else None

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        assert q_BTHD.shape[:2] == (1, self._num_tokens), (
            f"expected 1 x {self._num_tokens} tokens, found {tuple(q_BTHD.shape[:2])}"
        )
        keys_SKLD, values_SKLD = self._keys[layer], self._values[layer]
        q_THD = q_BTHD[0].to(keys_SKLD.dtype)
        k_TKD, v_TKD = k_BTKD[0].to(keys_SKLD.dtype), v_BTKD[0].to(keys_SKLD.dtype)
        o_THD = torch.empty_like(q_THD)
        for span, offset, mask_TL, first in self._prefills:
            rows = slice(offset, offset + span.length)
            keys_KLD, values_KLD = keys_SKLD[span.slot], values_SKLD[span.slot]
            keys_KLD[:, span.start : span.stop] = k_TKD[rows].transpose(0, 1)
            values_KLD[:, span.start : span.stop] = v_TKD[rows].transpose(0, 1)
            seen = slice(first, span.stop)
            o_THD[rows] = _attend_span(q_THD[rows], keys_KLD[:, seen], values_KLD[:, seen], mask_TL)
        if self._decode is not None:
            rows_N = self._decode.rows_N
            o_THD[rows_N] = self._decode.attend(
                keys_SKLD, values_SKLD, q_THD[rows_N], k_TKD[rows_N], v_TKD[rows_N]
            )
        return o_THD[None].to(q_BTHD.dtype)


class _DecodeBatch:
    """All spans of one token, ordered by slot so that neighbouring slots are read in place."""

    def __init__(
        self,
        decodes: Sequence[tuple[int, int, int]],
        window: int | None,
        device: torch.device,
    ) -> None:
        slots, starts, rows = zip(*decodes, strict=True)
        self.rows_N = torch.tensor(rows, device=device)
        self._slots_N = torch.tensor(slots, device=device)
        self._starts_N = torch.tensor(starts, device=device)
        is_dense = slots[-1] - slots[0] + 1 == len(slots)
        self._slot_range = slice(slots[0], slots[-1] + 1) if is_dense else None
        first = min(_first_visible(Span(0, start, 1), window) for start in starts)
        self._seen = slice(first, max(starts) + 1)
        positions_L = torch.arange(self._seen.start, self._seen.stop, device=device)
        mask_NL = _visible(self._starts_N, positions_L, window)
        self._mask_N11L = None if bool(mask_NL.all()) else mask_NL[:, None, None, :]

    def attend(
        self, keys_SKLD: Tensor, values_SKLD: Tensor, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor
    ) -> Tensor:
        """Write one token to each slot and return what it attends to, o_NHD."""
        keys_SKLD[self._slots_N, :, self._starts_N] = k_NKD
        values_SKLD[self._slots_N, :, self._starts_N] = v_NKD
        # The G queries of a key head become G rows of one matrix: nothing is repeated in memory.
        q_NKGD = q_NHD.unflatten(1, (k_NKD.shape[1], -1))
        o_NKGD = functional.scaled_dot_product_attention(
            q_NKGD, self._read(keys_SKLD), self._read(values_SKLD), attn_mask=self._mask_N11L
        )
        return o_NKGD.flatten(1, 2)

    def _read(self, cache_SKLD: Tensor) -> Tensor:
        if self._slot_range is not None:
            return cache_SKLD[self._slot_range, :, self._seen]
        return cache_SKLD[:, :, self._seen].index_select(0, self._slots_N)


def _attend_span(
    q_THD: Tensor, keys_KLD: Tensor, values_KLD: Tensor, mask_TL: Tensor | None
) -> Tensor:
    """Return o_THD for one span; without a mask the span is the whole sequence."""
    o_1HTD = functional.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        keys_KLD[None],
        values_KLD[None],
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        enable_gqa=True,
    )
    return o_1HTD[0].transpose(0, 1)


def _prefill_mask(span: Span, window: int | None, device: torch.device) -> Tensor | None:
    if span.length == 1 or (span.start == 0 and (window is None or window >= span.length)):
        return None
    queries_T = torch.arange(span.start, span.stop, device=device)
    keys_L = torch.arange(_first_visible(span, window), span.stop, device=device)
    return _visible(queries_T, keys_L, window)


def _first_visible(span: Span, window: int | None) -> int:
    return 0 if window is None else max(0, span.start - window + 1)


def _visible(queries_T: Tensor, keys_L: Tensor, window: int | None) -> Tensor:
    """Return which positions each query sees: itself, and those before it within the window."""
    distance_TL = queries_T[:, None] - keys_L[None, :]
    is_past = distance_TL >= 0
    return is_past if window is None else is_past & (distance_TL < window)
