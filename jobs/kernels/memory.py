"""Memory of weights, so that a process holds what they occupy and little more.

Takes tensors; gives copies in memory of their own, and memory that nothing uses back to the
system. It does not know what is in them.
"""

import ctypes
import mmap

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.kernels import native_ops

_HUGE_PAGE_BYTES = 2 << 20


def resident(packed: Tensor) -> Tensor:
    """Return a copy in memory of large pages, which is where weights are streamed from.

    Its pages are new: of memory that was used before, the room that aligns the copy would stay
    resident as well.
    """
    if packed.nbytes < _HUGE_PAGE_BYTES:
        return packed.clone()
    # It begins where a page does: only whole pages are large ones.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = torch.frombuffer(
        mmap.mmap(-1, packed.nbytes + _HUGE_PAGE_BYTES, flags=flags), dtype=torch.uint8
    )
    skipped = -room.data_ptr() % _HUGE_PAGE_BYTES
    copy = room[skipped : skipped + packed.nbytes].view(packed.dtype).view(packed.shape)
    native_ops.advise_huge_pages(copy)
    return copy.copy_(packed)


def give_back() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Loading frees more than it leaves, and the allocator would keep most of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class StoredEmbedding(nn.Module):
    """An embedding that stays in bfloat16, whose rows come in another type, for inference."""

    def __init__(self, weight_VC: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VC, requires_grad=False)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Return rows [..., C] of token ids, in `dtype`."""
        return functional.embedding(tokens, self.weight).to(self.dtype)
