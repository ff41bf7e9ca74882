"""Number formats of training: what runs in bfloat16 and what stays in float32.

Takes the name of a precision; gives the context a forward pass runs in. Weights, gradients and
optimizer state are float32 in both.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from jobs.config import Precision


def forward_context(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
