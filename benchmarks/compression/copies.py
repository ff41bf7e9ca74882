"""Copies of a model that are known to be equal, judged by everything that the gate judges.

Takes a trial and the gate's limits; gives copies' verdicts. A copy is the dense model rewritten
without a change of what it computes, stored dense or in W8A8. Dense copies differ by the order of
sums, those in W8A8 also by rounding, which the rewriting moves.

No limit is stricter than three times what a copy of the same kind costs where more text is read:
perplexity on the whole test split, and greedy choices on four times the prompts.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.compression.contenders import DENSE, W8A8
from benchmarks.compression.estimates import estimate, increase
from benchmarks.compression.trial import Trial
from jobs.compression.packing import LoadedModel, load_model, save_compressed
from jobs.compression.recipe import apply_recipe
from jobs.config import GateConfig, Recipe
from jobs.evaluation.compare import (
    check,
    find_faults,
    measure_agreement,
    time_beside,
    weight_file_bytes,
)
from jobs.evaluation.gate import Measurement, Verdict, judge
from jobs.evaluation.quality import sequence_losses
from jobs.models import decoder
from jobs.models.decoder import Block, Decoder

_RECIPES = {DENSE: Recipe(), "w8a8": W8A8}
_TIMES_COST = 3
_TIMES_PROMPTS = 4
_REFERENCE_SEED = 1_000_000  # no case's
_AGREEMENTS = 0.01, 0.99  # A copy's choice may be a tie, which the order of sums decides.


@dataclass(frozen=True)
class Copies:
    """One model's copies of a kind, and the limits that a copy on more text keeps three times."""

    trial: Trial
    kind: str
    limits: GateConfig

    def verdict(self, seed: int, rows: slice) -> Verdict:
        """Judge a copy on some sequences of the test split."""
        sequences, limits = self.trial.sequences[rows], self.limits
        base = load_model(self.trial.model, verify=False)
        base_bytes, size_bytes = self.trial.size_bytes(DENSE), self.trial.size_bytes("w8a8")
        assert base_bytes is not None, "a contender"
        with _stored(self.trial, self.kind, seed) as directory:
            loaded = load_model(directory, verify=False)
            measured = Measurement.from_losses(
                self.trial.losses(DENSE)[rows],
                sequence_losses(loaded.model, sequences, 1),
                limits,
                # A copy that is not smaller is refused by design.
                size_bytes=size_bytes if self.kind == DENSE else weight_file_bytes(directory),
                base_size_bytes=base_bytes,
                **dict(check(loaded, base, time_beside(loaded, base), sequences, limits)),
                faults=find_faults(directory, loaded, sequences),
            )
        return judge(measured, limits)


def copies_of(trial: Trial, kind: str, limits: GateConfig) -> Copies:
    """Return a model's copies of a kind with the limits for them."""
    base = load_model(trial.model, verify=False)
    name = f"{kind}-copy"
    with _stored(trial, kind, _REFERENCE_SEED) as directory:
        loaded = load_model(directory, verify=False)
        losses = {name: trial.measure(name, lambda: loaded.model), DENSE: trial.losses(DENSE)}
        agreement = _agreement(loaded, base, trial, limits)
    cost = estimate([losses], increase(name, DENSE)).upper
    lowest, highest = _AGREEMENTS
    return Copies(
        trial,
        kind,
        limits.replace(
            max_perplexity_increase=max(limits.max_perplexity_increase, _TIMES_COST * cost),
            min_agreement=float(np.clip(1 - _TIMES_COST * (1 - agreement), lowest, highest)),
        ),
    )


def rewritten(model: Decoder, seed: int) -> Decoder:
    """Return the model, changed in place: heads and MLP channels in another order and scale.

    Scales are powers of two between `up_proj` and `down_proj`, which floating point carries out
    exactly; only the order of sums changes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            assert isinstance(block, Block), "a decoder has blocks"
            _move_heads(block, model.config.resolved_head_dim, generator)
            _move_channels(block, generator)
    return model


def _move_channels(block: Block, generator: torch.Generator) -> None:
    mlp = block.mlp
    width = mlp.up_proj.weight.shape[0]
    order_F = torch.randperm(width, generator=generator)
    scale_F = torch.exp2(torch.randint(-1, 2, (width,), generator=generator).float())
    mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order_F])
    mlp.up_proj.weight.copy_(mlp.up_proj.weight[order_F] * scale_F[:, None])
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order_F] / scale_F)


def _move_heads(block: Block, head_dim: int, generator: torch.Generator) -> None:
    """Move key/value heads with the query heads that read them, and those among themselves."""
    part = block.self_attn
    num_kv = part.k_proj.weight.shape[0] // head_dim
    num_query = part.q_proj.weight.shape[0] // head_dim
    order_K = torch.randperm(num_kv, generator=generator)
    groups_KG = torch.arange(num_query).view(num_kv, -1)[order_K]
    order_H = torch.cat([g[torch.randperm(len(g), generator=generator)] for g in groups_KG])
    rows_Q, rows_V = _places(order_H, head_dim), _places(order_K, head_dim)
    for linear, rows in ((part.q_proj, rows_Q), (part.k_proj, rows_V), (part.v_proj, rows_V)):
        linear.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[rows])
    part.o_proj.weight.copy_(part.o_proj.weight[:, rows_Q])


def _places(order_H: Tensor, head_dim: int) -> Tensor:
    return (order_H[:, None] * head_dim + torch.arange(head_dim)).flatten()


@contextmanager
def _stored(trial: Trial, kind: str, seed: int) -> Iterator[Path]:
    copy = rewritten(decoder.load(trial.model), seed)
    with tempfile.TemporaryDirectory(prefix="raysmith-bench-") as folder:
        save_compressed(apply_recipe(copy, _RECIPES[kind]), Path(folder))
        yield Path(folder)


def _agreement(loaded: LoadedModel, base: LoadedModel, trial: Trial, limits: GateConfig) -> float:
    more = limits.replace(agreement_prompts=_TIMES_PROMPTS * limits.agreement_prompts)
    return measure_agreement(loaded, base, trial.sequences, more).lower
