"""How fast a model decodes and how much memory it holds, with the kernels that serve it.

Takes models; gives milliseconds per decoding step and bytes. It does not know about requests or
schedulers: this is the model's own speed, every sequence of a batch one token further a step.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cluster.config import StrictModel
from jobs.config import KvCache
from jobs.evaluation.cached import SequenceCache
from jobs.kernels.linear import resident_bytes
from jobs.models._fused import FusedDecoder, can_fuse
from jobs.models.decoder import Decoder

_WARM_UP_STEPS = 2


class Latency(StrictModel):
    """Time of one decoding step of a whole batch, over all steps timed, and the memory held.

    `rounds_ms` are the medians of the runs that took turns with other models' runs.
    """

    p50_ms: float
    p10_ms: float
    p90_ms: float
    tokens_per_s: float
    batch: int
    context: int
    steps: int
    weight_bytes: int
    cache_bytes: int
    rounds_ms: tuple[float, ...] = ()


def decode_latency(
    model: Decoder,
    *,
    batch: int = 1,
    context: int = 128,
    tokens: int = 16,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time `repeats` runs of `tokens` steps, each behind `context` tokens of every sequence."""
    (measured,) = compare_latency(
        [model], batch=batch, context=context, tokens=tokens, repeats=repeats, clock=clock
    )
    return measured


def compare_latency(
    models: Sequence[Decoder],
    *,
    batch: int = 1,
    context: int = 128,
    tokens: int = 16,
    repeats: int = 3,
    kv_caches: Sequence[KvCache] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Latency]:
    """Time several models in turns, so that a machine that slows down slows all of them alike.

    Every other round goes backwards, so that none is always the first. `context` + `tokens` must
    not exceed any model's longest position. `kv_caches` says how each keeps keys and values; unset:
    all in the type of activations.
    """
    runs = _runs(models, kv_caches, batch, context, tokens)
    rounds: list[list[list[float]]] = [[] for _ in runs]
    with torch.inference_mode():
        for run in runs:
            run.prefill()
            run.decode(min(_WARM_UP_STEPS, tokens), clock)
        for number in range(repeats):
            for place in range(len(runs))[:: -1 if number % 2 else 1]:
                rounds[place].append(runs[place].decode(tokens, clock))
    return [run.summary(taken) for run, taken in zip(runs, rounds, strict=True)]


def request_times(
    models: Sequence[Decoder],
    *,
    prompt_tokens: int,
    output_tokens: int,
    repeats: int = 5,
    kv_caches: Sequence[KvCache] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time whole requests, one at a time, of several models in turns: milliseconds of each.

    Every other turn goes backwards, so that none is always the first.

    A request is one pass over its prompt, which gives the first token, and one for every further
    token. Both numbers together must not exceed any model's longest position; `kv_caches` as in
    `compare_latency`.
    """
    runs = _runs(models, kv_caches, 1, prompt_tokens, output_tokens)
    times_ms: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for turn in range(1 + repeats):
            for place in range(len(runs))[:: -1 if turn % 2 else 1]:
                began = clock()
                runs[place].prefill()
                runs[place].decode(output_tokens - 1, clock)
                if turn:  # The first warms up.
                    times_ms[place].append((clock() - began) * 1e3)
    return times_ms


def _runs(
    models: Sequence[Decoder],
    kv_caches: Sequence[KvCache] | None,
    batch: int,
    context: int,
    tokens: int,
) -> "list[_DecodeRun]":
    kinds = kv_caches or ["auto"] * len(models)
    return [
        _DecodeRun(model, kind, batch, context, tokens)
        for model, kind in zip(models, kinds, strict=True)
    ]


class _DecodeRun:
    """One model's cache, filled with `context` random tokens for each sequence of the batch."""

    def __init__(
        self, model: Decoder, kv_cache: KvCache, batch: int, context: int, tokens: int
    ) -> None:
        assert min(batch, context, tokens) >= 1, "batch, context and tokens must be positive"
        assert context + tokens <= model.config.max_seq_len, (
            f"{context} + {tokens} tokens exceed max_seq_len={model.config.max_seq_len}"
        )
        self.model, self.batch, self.context = model, batch, context
        self.forward = FusedDecoder(model) if can_fuse(model) else model
        self.device = model.model.norm.weight.device
        self.cache = SequenceCache(model, kv_cache, batch, context + tokens)
        generator = torch.Generator().manual_seed(0)
        self.prompts_BT = torch.randint(
            model.config.vocab_size, (batch, context), generator=generator
        ).to(self.device)

    def prefill(self) -> None:
        """Fill the cache with every sequence's prompt, and find the token that follows it."""
        positions_1T = torch.arange(self.context, device=self.device)[None]
        for row in range(self.batch):
            attention = self.cache.blocks.attention([self.cache.span(row, 0, self.context)])
            tokens_1T = self.prompts_BT[row : row + 1]
            hidden_1TC = self.forward.hidden(tokens_1T, positions_1T, attention)
            self.forward.head(hidden_1TC[:, -1:]).argmax(dim=-1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def decode(self, steps: int, clock: Callable[[], float]) -> list[float]:
        """Decode `steps` tokens after the prompt, greedily; return the seconds of each step."""
        tokens_1T = self.prompts_BT[:, -1][None]
        seconds = []
        for position in range(self.context, self.context + steps):
            began = clock()
            spans = [self.cache.span(row, position, 1) for row in range(self.batch)]
            positions_1T = torch.full_like(tokens_1T, position)
            attention = self.cache.blocks.attention(spans)
            hidden_1TC = self.forward.hidden(tokens_1T, positions_1T, attention)
            tokens_1T = self.forward.head(hidden_1TC).argmax(dim=-1)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(clock() - began)
        return seconds

    def summary(self, rounds: Sequence[Sequence[float]]) -> Latency:
        """Return the spread of the steps' times."""
        seconds = [step for steps in rounds for step in steps]
        p10, p50, p90 = np.quantile(np.asarray(seconds) * 1e3, [0.1, 0.5, 0.9])
        return Latency(
            p50_ms=float(p50),
            p10_ms=float(p10),
            p90_ms=float(p90),
            tokens_per_s=self.batch * len(seconds) / sum(seconds),
            batch=self.batch,
            context=self.context,
            steps=len(seconds),
            weight_bytes=resident_bytes(self.model),
            cache_bytes=self.cache.blocks.bytes(),
            rounds_ms=tuple(1e3 * float(np.median(steps)) for steps in rounds),
        )
