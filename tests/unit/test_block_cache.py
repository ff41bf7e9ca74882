"""Attention over blocks of cached keys and values, against forward passes over whole sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.config import DecoderConfig
from jobs.kernels import native
from jobs.kernels.attention import Attention
from jobs.kernels.block_cache import BlockCache, BlockSpan
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
BLOCK_SIZE = 4
NUM_SEQUENCES = 4
PATHS = ["torch", "fixed shapes", "c++"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Session:
    """Runs sequences through a cache, in the pieces that a test chooses and scattered blocks."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, path: str) -> None:
        if path == "c++" and (reason := native.why_unavailable()):
            pytest.skip(reason)
        self.path = path
        self.model = decoder.build(config, seed=0)
        per_sequence = config.max_seq_len // BLOCK_SIZE
        num_blocks = NUM_SEQUENCES * per_sequence
        self.cache = BlockCache(config, num_blocks, BLOCK_SIZE, dtype, use_kernels=path == "c++")
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
        self.blocks = [tuple(blocks) for blocks in order.view(NUM_SEQUENCES, -1).tolist()]
        self.tokens: dict[int, Tensor] = {}
        self.done: dict[int, int] = {}
        self.logits: dict[int, list[Tensor]] = {}

    def begin(self, index: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens[index] = torch.randint(0, 61, (length,), generator=generator)
        self.done[index], self.logits[index] = 0, []

    @torch.no_grad()
    def step(self, lengths: dict[int, int]) -> None:
        spans = [BlockSpan(self.blocks[i], self.done[i], n) for i, n in lengths.items()]
        placed = list(zip(lengths, spans, strict=True))
        tokens = torch.cat([self.tokens[i][s.start : s.stop] for i, s in placed])
        positions = torch.cat([torch.arange(s.start, s.stop) for s in spans])
        attention = self.attention(spans, positions)
        logits = self.model(tokens[None], positions[None], attention)[0]
        rows = logits.split([s.length for s in spans])
        for (index, span), rows_TV in zip(placed, rows, strict=True):
            self.logits[index].append(rows_TV)
            self.done[index] = span.stop

    def attention(self, spans: list[BlockSpan], positions_T: Tensor) -> Attention:
        if self.path != "fixed shapes" or any(span.length > 1 for span in spans):
            return self.cache.attention(spans)
        blocks_NP = torch.tensor([span.blocks for span in spans])
        return self.cache.decode_attention(blocks_NP, positions_T)

    @torch.no_grad()
    def largest_error(self, index: int) -> float:
        found = torch.cat(self.logits[index])
        expected = self.model(self.tokens[index][None, : len(found)])[0]
        return float((found - expected).abs().max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 4])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(plan=st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1), max_size=8))
def test_block_cache_when_sequences_run_in_any_pieces_equals_the_full_forward(
    window: int | None, path: str, plan: list[dict[int, int]]
) -> None:
    session = Session(CONFIG.replace(sliding_window=window), torch.float32, path)
    for index in range(NUM_SEQUENCES):
        session.begin(index, CONFIG.max_seq_len, seed=index)
    for lengths in plan:
        fitting = {i: min(n, CONFIG.max_seq_len - session.done[i]) for i, n in lengths.items()}
        if active := {index: length for index, length in fitting.items() if length > 0}:
            session.step(active)
    for index in range(NUM_SEQUENCES):
        if session.logits[index]:
            assert session.largest_error(index) < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_block_cache_when_decoding_together_equals_the_full_forward(path: str) -> None:
    session = Session(CONFIG, torch.float32, path)
    for index in (2, 0, 3):
        session.begin(index, 20, seed=index)
        session.step({index: 3 + index})
    for _ in range(8):
        session.step(dict.fromkeys((2, 0, 3), 1))
    assert max(session.largest_error(index) for index in (2, 0, 3)) < 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [7.0, float("nan")])
def test_block_cache_when_blocks_are_used_again_forgets_the_former_sequence(
    left: float, path: str
) -> None:
    session = Session(CONFIG, torch.float32, path)
    spans = [BlockSpan(blocks, 0, CONFIG.max_seq_len) for blocks in session.blocks]
    whole = torch.full((1, NUM_SEQUENCES * CONFIG.max_seq_len, 4, 8), left)
    for layer in range(CONFIG.num_layers):
        session.cache.attention(spans)(layer, whole, whole[:, :, :2], whole[:, :, :2])
    session.begin(1, 10, seed=9)
    session.begin(2, 30, seed=8)
    session.step({1: 6, 2: 27})
    session.step({1: 1, 2: 1})
    assert session.largest_error(1) < 1e-4
    assert session.largest_error(2) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_decode_attention_when_the_pool_is_full_of_rubbish_does_not_see_it(
    dtype: torch.dtype,
) -> None:
    found = []
    for left in (0.0, 7.0, float("nan")):
        session = Session(CONFIG, dtype, "fixed shapes")
        whole = torch.full((1, NUM_SEQUENCES * CONFIG.max_seq_len, 4, 8), left)
        spans = [BlockSpan(blocks, 0, CONFIG.max_seq_len) for blocks in session.blocks]
        for layer in range(CONFIG.num_layers):
            session.cache.attention(spans)(layer, whole, whole[:, :, :2], whole[:, :, :2])
        session.begin(1, 12, seed=9)
        session.step({1: 2})
        for _ in range(10):
            session.step({1: 1})
        found.append(torch.cat(session.logits[1]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_decode_attention_when_rows_are_repeated_gives_the_same_answers() -> None:
    logits = []
    for copies in (1, 3):
        session = Session(CONFIG, torch.float32, "fixed shapes")
        session.begin(0, 20, seed=3)
        session.step({0: 9})
        for place in range(9, 14):
            positions_T = torch.full((copies,), place)
            blocks_NP = torch.tensor([session.blocks[0]] * copies)
            attention = session.cache.decode_attention(blocks_NP, positions_T)
            tokens_T = session.tokens[0][place].repeat(copies)
            with torch.no_grad():
                found_TV = session.model(tokens_T[None], positions_T[None], attention)[0]
            logits.append(found_TV[0])
            torch.testing.assert_close(found_TV, found_TV[:1].expand_as(found_TV))
    torch.testing.assert_close(torch.stack(logits[:5]), torch.stack(logits[5:]))


@pytest.mark.parametrize("path", PATHS)
def test_block_cache_when_sequences_share_a_prefix_reads_the_same_blocks(path: str) -> None:
    session = Session(CONFIG, torch.float32, path)
    for index in (0, 1):
        session.begin(index, 20, seed=5)
    session.step({0: 9})
    session.blocks[1] = (*session.blocks[0][:2], *session.blocks[1][2:])
    session.done[1] = 2 * BLOCK_SIZE
    session.step({0: 1, 1: 5})
    expected = session.model(session.tokens[1][None])[0, 8:13]
    torch.testing.assert_close(session.logits[1][0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.3), (torch.int8, 0.5)])
def test_block_cache_when_values_are_rounded_stays_near(
    dtype: torch.dtype, limit: float, path: str
) -> None:
    session = Session(CONFIG, dtype, path)
    session.begin(0, 20, seed=0)
    session.step({0: 10})
    for _ in range(5):
        session.step({0: 1})
    assert 0 < session.largest_error(0) < limit


@pytest.mark.parametrize(
    ("dtype", "token_bytes"),
    [(torch.float32, 64 * 4), (torch.bfloat16, 64 * 2), (torch.int8, 64 + 4)],
)
def test_block_cache_when_asked_for_its_bytes_counts_values_and_scales(
    dtype: torch.dtype, token_bytes: int
) -> None:
    config = CONFIG.replace(head_dim=64)
    expected = 2 * 2 * 2 * 16 * token_bytes  # keys and values, layers, heads, tokens
    assert BlockCache.bytes_per_block(config, 16, dtype) == expected
    assert BlockCache(config, 3, 16, dtype).bytes() == 3 * expected


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "at least one span"),
        ([BlockSpan((0, 2), 0, 5)], "there are 2 blocks"),
        ([BlockSpan((-1,), 0, 1)], "must not be negative"),
        ([BlockSpan((0, 1), 4, 5)], "its blocks hold 8 tokens"),
        ([BlockSpan((0,), 0, 0)], "length must be positive"),
        ([BlockSpan((0,), -1, 2)], "start must not be negative"),
    ],
)
def test_block_cache_when_spans_are_impossible_stops_at_once(
    spans: list[BlockSpan], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        BlockCache(CONFIG, 2, BLOCK_SIZE, torch.float32).attention(spans)


def test_block_cache_when_tokens_do_not_match_the_spans_stops_at_once() -> None:
    cache = BlockCache(CONFIG, 2, BLOCK_SIZE, torch.float32)
    attention: Attention = cache.attention([BlockSpan((0,), 0, 3)])
    with pytest.raises(AssertionError, match="expected 1 x 3 tokens"):
        attention(0, draw(1, 2, 4, 8), draw(1, 2, 2, 8), draw(1, 2, 2, 8))
