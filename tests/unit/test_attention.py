"""Attention over whole sequences and over cached slots, against a plain reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.config import DecoderConfig
from jobs.kernels.attention import Attention, SlotCache, Span, attend_causal
from jobs.kernels.blocked_attention import attend_blocked
from jobs.models import decoder

CONFIG = DecoderConfig(
    shape="mistral",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=48,
    initializer_range=0.3,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, window: int | None) -> Tensor:
    """Attention written out: a score for each pair, one token and one head at a time."""
    batch, length, num_heads, head_dim = q_BTHD.shape
    group = num_heads // k_BTKD.shape[2]
    o_BTHD = torch.zeros_like(q_BTHD)
    for b in range(batch):
        for t in range(length):
            first = 0 if window is None else max(0, t - window + 1)
            for h in range(num_heads):
                keys = k_BTKD[b, first : t + 1, h // group]
                weights = (keys @ q_BTHD[b, t, h] / math.sqrt(head_dim)).softmax(0)
                o_BTHD[b, t, h] = weights @ v_BTKD[b, first : t + 1, h // group]
    return o_BTHD


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attend_causal_when_compared_to_the_plain_formula_is_equal(
    num_kv_heads: int, window: int | None
) -> None:
    q, k, v = draw(2, 9, 4, 6), draw(2, 9, num_kv_heads, 6, seed=1), draw(2, 9, num_kv_heads, 6)
    found = attend_causal(q, k, v, window)
    torch.testing.assert_close(found, reference(q, k, v, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 50, 200])
@pytest.mark.parametrize("length", [1, 128, 300])
def test_attend_blocked_when_compared_to_the_fused_kernel_is_equal(
    num_kv_heads: int, window: int | None, length: int
) -> None:
    q = draw(2, length, 4, 16)
    k, v = draw(2, length, num_kv_heads, 16, seed=1), draw(2, length, num_kv_heads, 16, seed=2)
    found = attend_blocked(*(x.transpose(1, 2) for x in (q, k, v)), window).transpose(1, 2)
    torch.testing.assert_close(found, attend_causal(q, k, v, window), atol=1e-5, rtol=0)


def test_attend_causal_when_training_in_bfloat16_has_the_gradients_of_float32() -> None:
    exact = [draw(2, 200, 4, 16, seed=s).requires_grad_() for s in range(3)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    outputs = [attend_causal(*inputs, None) for inputs in (exact, rounded)]
    torch.testing.assert_close(outputs[1].float(), outputs[0], atol=0.05, rtol=0)
    for output in outputs:
        output.float().square().sum().backward()
    for found, expected in zip(rounded, exact, strict=True):
        assert (found.grad - expected.grad).norm() <= 0.02 * expected.grad.norm()


class Session:
    """Runs sequences through a cache in the pieces that a test chooses."""

    def __init__(self, config: DecoderConfig, num_slots: int, dtype: torch.dtype) -> None:
        self.model = decoder.build(config, seed=0)
        self.cache = SlotCache(config, num_slots, config.max_seq_len, dtype)
        self.sequences: dict[int, Tensor] = {}
        self.done: dict[int, int] = {}
        self.logits: dict[int, list[Tensor]] = {}

    def begin(self, slot: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sequences[slot] = torch.randint(0, 61, (length,), generator=generator)
        self.done[slot], self.logits[slot] = 0, []

    @torch.no_grad()
    def step(self, lengths: dict[int, int]) -> None:
        spans = [Span(slot, self.done[slot], length) for slot, length in lengths.items()]
        tokens = torch.cat([self.sequences[s.slot][s.start : s.stop] for s in spans])
        positions = torch.cat([torch.arange(s.start, s.stop) for s in spans])
        logits = self.model(tokens[None], positions[None], self.cache.attention(spans))[0]
        for span, rows in zip(spans, logits.split([s.length for s in spans]), strict=True):
            self.logits[span.slot].append(rows)
            self.done[span.slot] = span.stop

    @torch.no_grad()
    def largest_error(self, slot: int) -> float:
        found = torch.cat(self.logits[slot])
        expected = self.model(self.sequences[slot][None, : len(found)])[0]
        return float((found - expected).abs().max())


@pytest.mark.parametrize("window", [None, 4])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(plan=st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1), max_size=8))
def test_slot_cache_when_sequences_run_in_any_pieces_equals_the_full_forward(
    window: int | None, plan: list[dict[int, int]]
) -> None:
    session = Session(CONFIG.replace(sliding_window=window), num_slots=4, dtype=torch.float32)
    for slot in range(4):
        session.begin(slot, CONFIG.max_seq_len, seed=slot)
    for lengths in plan:
        fitting = {s: min(n, CONFIG.max_seq_len - session.done[s]) for s, n in lengths.items()}
        if active := {slot: length for slot, length in fitting.items() if length > 0}:
            session.step(active)
    for slot in range(4):
        if session.logits[slot]:
            assert session.largest_error(slot) < 1e-4


@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 1), (0, 3, 5), (4,)])
def test_slot_cache_when_decoding_together_equals_the_full_forward(slots: tuple[int, ...]) -> None:
    session = Session(CONFIG, num_slots=6, dtype=torch.float32)
    for slot in slots:
        session.begin(slot, 20, seed=slot)
        session.step({slot: 3 + slot})
    for _ in range(8):
        session.step(dict.fromkeys(slots, 1))
    assert max(session.largest_error(slot) for slot in slots) < 1e-4


def test_slot_cache_when_a_slot_is_used_again_forgets_the_former_sequence() -> None:
    session = Session(CONFIG, num_slots=2, dtype=torch.float32)
    session.begin(1, 30, seed=0)
    session.step({1: 30})
    session.begin(1, 10, seed=9)
    session.step({1: 6})
    session.step({1: 1})
    assert session.largest_error(1) < 1e-4


def test_slot_cache_when_bfloat16_holds_half_the_bytes_and_stays_near() -> None:
    session = Session(CONFIG, num_slots=2, dtype=torch.bfloat16)
    session.begin(0, 20, seed=0)
    session.step({0: 10})
    for _ in range(5):
        session.step({0: 1})
    exact = SlotCache(CONFIG, 2, CONFIG.max_seq_len, torch.float32)
    assert exact.bytes() == 2 * 2 * 2 * 2 * 48 * 8 * 4  # k and v, layers, slots, heads, L, D, f32
    assert session.cache.bytes() * 2 == exact.bytes()
    assert 0 < session.largest_error(0) < 0.3


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "at least one span"),
        ([Span(2, 0, 1)], "there are 2 slots"),
        ([Span(0, 40, 9)], "a slot holds 48 tokens"),
        ([Span(0, 0, 0)], "length must be positive"),
        ([Span(0, -1, 2)], "start must not be negative"),
        ([Span(0, 0, 1), Span(0, 1, 1)], "a slot appears in two spans"),
    ],
)
def test_slot_cache_when_spans_are_impossible_stops_at_once(
    spans: list[Span], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        SlotCache(CONFIG, 2, 48, torch.float32).attention(spans)


def test_slot_cache_when_tokens_do_not_match_the_spans_stops_at_once() -> None:
    attention: Attention = SlotCache(CONFIG, 2, 48, torch.float32).attention([Span(0, 0, 3)])
    with pytest.raises(AssertionError, match="expected 1 x 3 tokens"):
        attention(0, draw(1, 2, 4, 8), draw(1, 2, 2, 8), draw(1, 2, 2, 8))
