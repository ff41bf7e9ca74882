"""The workers of one run, as the loop sees them: a rank among many, and what they exchange.

Takes a process group that is already initialised where there is more than one worker; gives sums
and barriers. It does not know who started the workers.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class World:
    """One worker's rank and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all workers, in place; every worker must call it."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until every worker is here."""
        if self.size > 1:
            distributed.barrier()


def device_of(gpus_per_worker: float) -> torch.device:
    """Return where this worker computes: its own GPU if it was given one, else the CPU."""
    if gpus_per_worker > 0:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return torch.device("cpu")
