"""C++ kernels around the products: against plain formulas, and against other batches."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from jobs.config import DecoderConfig
from jobs.kernels import native, native_ops
from jobs.kernels.attention import attend_causal
from jobs.kernels.block_cache import BlockCache, BlockSpan, PagedAttention
from jobs.models._rotary import rotate

LENGTH = 600  # more than two chunks of keys


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    if (reason := native.why_unavailable()) is not None:
        pytest.skip(reason)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [8, 64, 100, 896])
def test_rms_norm_when_compared_to_the_formula_is_equal(width: int) -> None:
    x_NC, weight_C = draw(9, width), draw(width, seed=1)
    out_NC = torch.empty_like(x_NC)
    native_ops.rms_norm(x_NC, weight_C, out_NC, 1e-5)
    expected = functional.rms_norm(x_NC, (width,), weight_C, 1e-5)
    torch.testing.assert_close(out_NC, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("width", [3, 16, 100, 4864])
def test_silu_mul_when_compared_to_the_formula_is_equal(width: int) -> None:
    gate_up = draw(9, 2 * width) * 20
    out = torch.empty(9, width)
    native_ops.silu_mul(gate_up, out)
    gate, up = gate_up.split(width, dim=1)
    torch.testing.assert_close(out, functional.silu(gate) * up, atol=1e-6, rtol=2e-6)
    native_ops.silu_mul(gate_up, gate_up[:, :width])
    assert torch.equal(gate_up[:, :width], out)


def test_silu_mul_when_gates_are_extreme_is_zero_or_the_gate() -> None:
    gate = torch.tensor([-1e30, -1000.0, -0.0, 0.0, 1000.0, 2.0**100, float("nan")])
    out = torch.empty(1, 7)
    native_ops.silu_mul(torch.cat([gate, torch.ones(7)])[None], out)
    assert out[0, :6].tolist() == [0.0, 0.0, 0.0, 0.0, 1000.0, 2.0**100]
    assert out[0, 6].isnan()


def test_elementwise_kernels_when_rows_and_threads_differ_give_the_same_bits() -> None:
    x_NC, weight_C = draw(37, 200), draw(200, seed=1)
    results = []
    for threads, rows in ((2, 37), (1, 1)):
        torch.set_num_threads(threads)
        normal_NC, product_NF = torch.empty(37, 200), torch.empty(37, 100)
        for first in range(0, 37, rows):
            part = slice(first, first + rows)
            native_ops.rms_norm(x_NC[part], weight_C, normal_NC[part], 1e-5)
            native_ops.silu_mul(x_NC[part], product_NF[part])
        results.append(torch.cat([normal_NC, product_NF], dim=1))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 40, 64])
def test_embed_when_compared_to_indexing_is_equal(dtype: torch.dtype, width: int) -> None:
    embedding_VC, tokens_T = draw(11, width).to(dtype), torch.tensor([10, 0, 3, 3, 7])
    out_TC = torch.empty(5, width)
    native_ops.embed(embedding_VC, tokens_T, out_TC)
    assert torch.equal(out_TC, embedding_VC[tokens_T].float())


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("vocab_size", [1, 15, 64, 1000, 4096])
def test_find_best_when_values_tie_or_are_not_finite_equals_torch(
    vocab_size: int, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    x_NV = draw(9, vocab_size).round()  # Many equal ones.
    x_NV[1], x_NV[2, -1], x_NV[3, vocab_size // 2 :] = -torch.inf, torch.inf, torch.nan
    x_NV[4, vocab_size // 3], x_NV[5] = torch.nan, torch.nan
    best_N, ids_N = native_ops.find_best(x_NV)
    expected_N = x_NV.numpy().argmax(axis=1)  # The lowest of equals, or of those that are NaN.
    assert ids_N.tolist() == expected_N.tolist()
    assert torch.equal(best_N.nan_to_num(), x_NV[range(9), expected_N].nan_to_num())
    assert best_N.isnan().tolist() == [n in (3, 4, 5) for n in range(9)]


def config_of(
    num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> DecoderConfig:
    return DecoderConfig(
        shape="mistral",
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=window,
    )


class Pages:
    """A cache with sequences in scattered blocks, all of the same queries, keys and values."""

    def __init__(
        self, config: DecoderConfig, block_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        count = -(-LENGTH // block_size)
        self.cache = BlockCache(config, 2 * count, block_size, dtype)
        order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(5)).tolist()
        self.blocks = (tuple(order[:count]), tuple(order[count:]))
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.qkv_TO = draw(LENGTH, (heads + 2 * kv_heads) * config.resolved_head_dim, seed=3)
        half = config.resolved_head_dim // 2
        angles_TD = torch.arange(LENGTH)[:, None] / torch.arange(3, half + 3)
        self.cos_TD, self.sin_TD = angles_TD.cos(), angles_TD.sin()
        self.norms = tuple(draw(config.resolved_head_dim, seed=s) for s in (7, 8))

    def run(self, *parts: tuple[int, int, int]) -> list[Tensor]:
        """Return o_TO of tokens [start, stop) of each (sequence, start, stop), layer 1."""
        spans = [BlockSpan(self.blocks[s], start, stop - start) for s, start, stop in parts]
        attention = self.cache.attention(spans)
        assert isinstance(attention, PagedAttention)
        rows = torch.cat([torch.arange(start, stop) for _, start, stop in parts])
        attention.rotate_by(self.cos_TD[rows].contiguous(), self.sin_TD[rows].contiguous())
        width = self.config.num_heads * self.config.resolved_head_dim
        out_TO = torch.empty(len(rows), width)
        attention.attend_rows(1, self.qkv_TO[rows], out_TO, self.norms, 1e-5)
        return list(out_TO.split([span.length for span in spans]))

    def expected(self) -> Tensor:
        config, dim = self.config, self.config.resolved_head_dim
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = (
            part.unflatten(1, (-1, dim))[None]
            for part in self.qkv_TO.split([count * dim for count in heads], dim=1)
        )
        q, k = (
            functional.rms_norm(x, (dim,), w, 1e-5) for x, w in zip((q, k), self.norms, strict=True)
        )
        angles = self.cos_TD[None, :, None], self.sin_TD[None, :, None]
        o = attend_causal(rotate(q, *angles), rotate(k, *angles), v, config.sliding_window)
        return o[0].flatten(1)


SHAPES = [(14, 2, 64), (4, 4, 8), (3, 1, 24), (70, 1, 16), (2, 2, 256)]


@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize("block_size", [16, 24, 5, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_attention_when_compared_to_causal_attention_is_equal(
    shape: tuple[int, int, int], block_size: int, window: int | None
) -> None:
    pages = Pages(config_of(*shape, window), block_size)
    torch.testing.assert_close(pages.run((0, 0, LENGTH))[0], pages.expected(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("window", [None, 270])
@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_paged_attention_when_spans_blocks_and_threads_differ_gives_the_same_bits(
    shape: tuple[int, int, int], block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    pages = Pages(config_of(*shape, window), block_size, dtype)
    whole = pages.run((0, 0, LENGTH))[0]
    stops = [1, 2, 15, 17, 256, 257, 258, 400, 511, 512, 599, LENGTH]
    found: list[Tensor] = []
    for step, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        torch.set_num_threads(1 + step % 2)
        found.append(pages.run((0, 0, 3 + step), (1, start, stop))[1])
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 0.01), (torch.int8, 0.03)], ids=["bfloat16", "int8"]
)
def test_paged_attention_when_the_cache_is_rounded_stays_near(
    dtype: torch.dtype, limit: float
) -> None:
    pages = Pages(config_of(14, 2, 64, None), 16, dtype)
    error = pages.run((0, 0, LENGTH))[0] - pages.expected()
    assert 0 < error.norm() < limit * pages.expected().norm()
