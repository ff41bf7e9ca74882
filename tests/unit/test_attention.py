"""Attention over whole sequences, against a plain reference."""

import math

import pytest
import torch
from torch import Tensor

from jobs.kernels.attention import attend_causal
from jobs.kernels.blocked_attention import attend_blocked


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
