"""How weights move: AdamW and the learning rate of each step.

Takes a config and a model; gives an optimizer, and the rate as a pure function of the step, so that
a resumed run needs no scheduler state.
"""

import math

import torch
from torch import nn
from torch.optim import AdamW

from jobs.config import OptimizerConfig, ScheduleConfig

# The ratio of PyTorch's OneCycleLR between its first and its highest rate.
_ONECYCLE_START_RATIO = 1 / 25


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return fused AdamW (Loshchilov and Hutter 2019); only matrices decay, not norms and biases.

    Its state exists from the start, so that a checkpoint can be read into it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, max_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the rate of a step that counts from 0.

    Every schedule rises to `peak` over `warmup_steps` and, but for `constant`, falls to
    `final_lr_ratio` of it at the last step: along half a cosine, or in a line (`linear`). All rise
    in a line from near zero, but for `onecycle`, which rises along half a cosine from a 25th of the
    peak (Smith and Topin 2018, as PyTorch's OneCycleLR anneals). A warm-up longer than the run is
    cut to it.
    """
    final = peak * schedule.final_lr_ratio
    last = max_steps - 1
    warmup = min(schedule.warmup_steps, last)
    if step < warmup:
        if schedule.kind == "onecycle":
            return _half_cosine(peak * _ONECYCLE_START_RATIO, peak, step / warmup)
        return peak * (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return peak
    progress = (step - warmup) / max(1, last - warmup)
    if schedule.kind == "linear":
        return peak + (final - peak) * min(1.0, progress)
    return _half_cosine(peak, final, progress)


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    """Use `rate` for every group from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
