"""Attention in both directions over sequences of different lengths, one behind the other.

Takes queries, keys and values of all tokens; gives what each attends to within its own sequence.
Nothing is padded. On CPUs with the C++ kernels a layer's sequences and heads are one call; else
PyTorch computes one sequence at a time. It does not know about projections or positions.

T tokens of all sequences, H heads, D size of a head
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from jobs.kernels import native

_DTYPES = (torch.float32, torch.bfloat16)
_attend = native.function("rs_attend_ragged", "ppppipnnnni")


def attend_ragged(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return o_THD; `lengths` are tokens of each sequence, in order, T in all."""
    assert sum(lengths) == q_THD.shape[0], f"{sum(lengths)} tokens of {q_THD.shape[0]} have a place"
    assert min(lengths) > 0, "a sequence without tokens has no attention"
    needs_grad = torch.is_grad_enabled() and q_THD.requires_grad
    is_known = q_THD.device.type == "cpu" and q_THD.dtype in _DTYPES and not needs_grad
    if is_known and native.is_available():
        return attend_natively(q_THD, k_THD, v_THD, lengths)
    return attend_plainly(q_THD, k_THD, v_THD, lengths)


def attend_natively(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return o_THD by the C++ kernel; a sequence's result depends on that sequence alone."""
    q_THD, k_THD, v_THD = (x.contiguous() for x in (q_THD, k_THD, v_THD))
    assert q_THD.shape == k_THD.shape == v_THD.shape, "queries, keys and values differ in shape"
    assert {x.dtype for x in (q_THD, k_THD, v_THD)} == {q_THD.dtype}, "they differ in type"
    _, num_heads, head_dim = q_THD.shape
    starts_N = torch.tensor(list(accumulate(lengths, initial=0)))
    o_THD = torch.empty_like(q_THD)
    _attend(
        *map(native.address, (q_THD, k_THD, v_THD, o_THD)),
        q_THD.dtype == torch.bfloat16,
        native.address(starts_N),
        len(lengths),
        num_heads,
        head_dim,
        num_heads * head_dim,
        native.num_threads(),
    )
    return o_THD


def attend_plainly(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return o_THD by PyTorch's attention, one sequence after another."""
    sizes = list(lengths)
    parts = []
    for sequence in zip(q_THD.split(sizes), k_THD.split(sizes), v_THD.split(sizes), strict=True):
        q_1HTD, k_1HTD, v_1HTD = (x.transpose(0, 1)[None] for x in sequence)
        o_1HTD = functional.scaled_dot_product_attention(q_1HTD, k_1HTD, v_1HTD)
        parts.append(o_1HTD[0].transpose(0, 1))
    return torch.cat(parts)
