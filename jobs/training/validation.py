"""Loss on held-out sequences, shared among the workers.

Takes a model and a split; gives one number, the same on every worker. It does not know training.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.data.tokens import TokenSplit
from jobs.training.precision import Computed, forward_context
from jobs.training.world import World


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the cross entropy of each token [B, T], in nats."""
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none"
    ).view(targets_BT.shape)


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    split: TokenSplit,
    *,
    seq_len: int,
    num_sequences: int,
    batch_size: int,
    precision: Computed,
    world: World,
) -> float:
    """Return the mean loss in nats per token over sequences spread evenly across the split.

    Every worker must call it: each takes its share.
    """
    device = next(model.parameters()).device
    available = split.num_sequences(seq_len)
    chosen = np.unique(np.linspace(0, available - 1, min(num_sequences, available), dtype=np.int64))
    mine = chosen[world.rank :: world.size]
    total = torch.zeros(2, dtype=torch.float64)
    # Not the compiled blocks: without gradients they would be compiled a second time.
    with torch.compiler.set_stance("force_eager"):
        for start in range(0, len(mine), batch_size):
            rows = torch.from_numpy(split.sequences(mine[start : start + batch_size], seq_len))
            rows = rows.to(device)
            with forward_context(precision, device):
                logits = model(rows[:, :-1])
            losses = token_losses(logits, rows[:, 1:])
            total += torch.tensor([losses.sum(dtype=torch.float64).item(), losses.numel()])
    summed, count = world.sum(total.to(device)).tolist()
    return float(summed / count)
