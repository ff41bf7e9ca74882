"""Number formats of training: what runs in bfloat16 and what stays in float32.

Takes the name of a precision; gives the context a forward pass runs in. Weights, gradients and
optimizer state are float32 in both.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from cluster import hardware
from jobs.config import Precision
from jobs.training.world import World

_logger = logging.getLogger(__name__)
Computed = Literal["fp32", "bf16"]


def resolve(precision: Precision, device: torch.device, world: World) -> Computed:
    """Return what all workers compute in; for `auto` every worker must call it.

    The same on all: fp32 if one of them is not faster in bf16.
    """
    if precision != "auto":
        return precision
    num_without = world.sum(torch.tensor(float(not _is_faster_in_bf16(device)), device=device))
    resolved: Computed = "fp32" if num_without else "bf16"
    if world.is_first:
        _logger.info("precision: auto is %s on these devices", resolved)
    return resolved


def forward_context(precision: Computed, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _is_faster_in_bf16(device: torch.device) -> bool:
    if device.type != "cuda":
        return hardware.training_precision([hardware.detect_cpu()]) == "bf16"
    known = hardware.load_catalogue().match(torch.cuda.get_device_name(device))
    if known is None:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return hardware.training_precision([known]) == "bf16"
