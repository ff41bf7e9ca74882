"""Attention over keys and values in int8, against plain arithmetic and itself."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import decoder_config
from torch import Tensor
from torch.nn import functional

from jobs.evaluation.quality import sequence_losses
from jobs.kernels import native
from jobs.kernels.attention import attend_causal, visible
from jobs.kernels.block_cache import BlockCache, BlockSpan
from jobs.models.decoder import build

BLOCK_SIZE = 4
PATHS = ["torch", "c++"]


def needs(path: str) -> None:
    if path == "c++" and (reason := native.why_unavailable()):
        pytest.skip(reason)


def draw(*shape: int, seed: int) -> Tensor:
    # Of different sizes from token to token and head to head: one scale for them would not do.
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1)
    return torch.randn(*shape, generator=generator) * sizes


def rounded(x: Tensor) -> Tensor:
    """Return what stays of rows [..., D] in int8 with a scale each, in plain arithmetic."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def attend_rounded(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, window: int | None) -> Tensor:
    """Return what tokens attend to, over rounded keys and values, in float64."""
    group = q_THD.shape[1] // k_TKD.shape[1]
    k_HTD, v_HTD = (rounded(x).double().transpose(0, 1) for x in (k_TKD, v_TKD))
    k_HTD, v_HTD = (x.repeat_interleave(group, dim=0) for x in (k_HTD, v_HTD))
    scores_HTT = q_THD.double().transpose(0, 1) @ k_HTD.mT / q_THD.shape[-1] ** 0.5
    places_T = torch.arange(len(q_THD))
    hidden_TT = ~visible(places_T, places_T, window)
    weights_HTT = scores_HTT.masked_fill(hidden_TT, -torch.inf).softmax(-1)
    return (weights_HTT @ v_HTD).transpose(0, 1).float()


class Session:
    """Sequences in an int8 cache of one layer, in scattered blocks."""

    def __init__(self, path: str, head_dim: int = 16, window: int | None = None) -> None:
        needs(path)
        config = decoder_config(num_layers=1, head_dim=head_dim, sliding_window=window)
        self.cache = BlockCache(config, 64, BLOCK_SIZE, torch.int8, use_kernels=path == "c++")
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        self.blocks = [tuple(blocks) for blocks in order.view(4, -1).tolist()]
        self.head_dim = head_dim

    def qkv(self, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = (4, 2, 2)
        q, k, v = (draw(length, h, self.head_dim, seed=7 * seed + i) for i, h in enumerate(heads))
        return q / 10, k, v

    def attend(self, parts: list[tuple[int, int, int]], inputs: list[tuple[Tensor, ...]]) -> Tensor:
        """Return o_THD of a pass over tokens [start, stop) of sequences."""
        spans = [BlockSpan(self.blocks[n], start, stop - start) for n, start, stop in parts]
        q, k, v = (
            torch.cat([inputs[n][i][start:stop] for n, start, stop in parts])[None]
            for i in range(3)
        )
        return self.cache.attention(spans)(0, q, k, v)[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("head_dim", [16, 20, 64, 128])
def test_attention_when_cached_in_int8_equals_plain_arithmetic(
    path: str, window: int | None, head_dim: int
) -> None:
    session = Session(path, head_dim, window)
    inputs = [session.qkv(33, seed=n) for n in range(2)]
    prompts = session.attend([(0, 0, 32), (1, 0, 29)], inputs)
    steps = session.attend([(1, 29, 30), (0, 32, 33)], inputs)
    expected = [attend_rounded(*each, window) for each in inputs]
    largest = max(float(x.abs().max()) for x in expected)
    found = torch.cat([prompts, steps])
    wanted = torch.cat([expected[0][:32], expected[1][:29], expected[1][29:30], expected[0][32:]])
    assert float((found - wanted).abs().max()) < 2e-6 * largest


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 30), max_size=4), others=st.integers(0, 2))
def test_attention_when_the_prompt_is_cut_anywhere_beside_anyone_is_the_same(
    path: str, cuts: list[int], others: int
) -> None:
    session = Session(path)
    inputs = [session.qkv(31, seed=n) for n in range(3)]
    whole = session.attend([(0, 0, 31)], inputs)
    bounds = sorted({0, *cuts, 31})
    pieces = []
    for start, stop in itertools.pairwise(bounds):
        parts = [(n, start, stop) for n in range(others + 1)]
        pieces.append(session.attend(parts, inputs)[: stop - start])
    if path == "c++":
        assert torch.equal(torch.cat(pieces), whole)
    else:  # PyTorch sums in an order of its own for every shape.
        torch.testing.assert_close(torch.cat(pieces), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_attention_when_guesses_are_taken_back_equals_never_guessing(path: str) -> None:
    found = []
    for is_guessing in (False, True):
        session = Session(path)
        inputs, guesses = session.qkv(20, seed=0), session.qkv(20, seed=5)
        session.attend([(0, 0, 14)], [inputs])
        if is_guessing:
            session.attend([(0, 14, 19)], [guesses])
        found.append(session.attend([(0, 14, 15)], [inputs]))
    assert torch.equal(*found)


class Rounding:
    """Attention of whole sequences that rounds keys and values by PyTorch's operators."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causal(q, rounded(k), rounded(v), None)


def test_sequence_losses_when_the_cache_is_int8_equal_plain_rounding() -> None:
    config = decoder_config(vocab_size=300, initializer_range=0.3)
    model = build(config, seed=1)
    tokens = torch.randint(0, 300, (5, 40), generator=torch.Generator().manual_seed(0))
    found = sequence_losses(model, tokens.numpy(), 2, kv_cache="int8")
    with torch.inference_mode():
        logits = model.head(model.hidden(tokens[:, :-1], None, Rounding()))
        expected = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
    assert found == pytest.approx(expected.view(5, -1).mean(dim=1).numpy(), abs=1e-4)
    assert found != pytest.approx(sequence_losses(model, tokens.numpy()), abs=1e-4)
