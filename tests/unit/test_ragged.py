"""Ragged attention: the C++ kernel against PyTorch's, and what a result may depend on."""

import pytest
import torch

from jobs.kernels import native
from jobs.kernels.ragged import attend_natively, attend_plainly, attend_ragged

LENGTHS = [1, 17, 5, 64, 3, 100]

needs_kernels = pytest.mark.skipif(
    not native.is_available(), reason="the C++ kernels cannot be built here"
)


def drawn(head_dim, dtype=torch.float32, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(head_dim)
    shape = (sum(lengths), 3, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))


@needs_kernels
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 64, 128])
def test_attention_when_computed_natively_equals_the_plain_one(head_dim):
    inputs = drawn(head_dim)
    expected = attend_plainly(*inputs, LENGTHS)
    torch.testing.assert_close(attend_natively(*inputs, LENGTHS), expected, atol=5e-6, rtol=1e-5)


@needs_kernels
def test_attention_when_bfloat16_equals_float32_to_its_rounding():
    inputs = drawn(32, torch.bfloat16)
    expected = attend_plainly(*(x.float() for x in inputs), LENGTHS)
    found = attend_natively(*inputs, LENGTHS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=2**-8)


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 2])
def test_attention_when_sequences_are_alone_is_bitwise_the_same(num_threads):
    inputs = drawn(32)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    together = attend_natively(*inputs, LENGTHS)
    torch.set_num_threads(before)
    parts = zip(*(x.split(LENGTHS) for x in inputs), LENGTHS, strict=True)
    alone = torch.cat([attend_natively(q, k, v, [length]) for q, k, v, length in parts])
    assert torch.equal(together, alone)


@needs_kernels
def test_attention_when_scores_are_extreme_stays_finite():
    q, k, v = drawn(32, lengths=[20])
    found = attend_natively(q * 1e4, k * 1e4, v, [20])
    torch.testing.assert_close(found, attend_plainly(q * 1e4, k * 1e4, v, [20]))


def test_attention_when_it_is_trained_gives_gradients():
    q, k, v = (x.requires_grad_() for x in drawn(16, lengths=[4, 2]))
    attend_ragged(q, k, v, [4, 2]).sum().backward()
    assert q.grad is not None
