"""Measure one model beside the dense one it came from, with the kernels that serve it, and judge.

Takes an EvaluateConfig; gives an Evaluation and, if asked, writes the verdict into the model's
manifest. It does not know why the model is evaluated or who publishes it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import ConfigError, ModelFormatError
from cluster.storage import (
    MANIFEST,
    read_manifest,
    resolve_output,
    verify_directory,
)
from jobs.compression.packing import LoadedModel, load_model
from jobs.compression.recipe import predicted_bytes
from jobs.config import DecoderConfig, EvaluateConfig, GateConfig, Recipe
from jobs.data.tokens import TokenSplit, open_split
from jobs.evaluation.agreement import greedy_agreement
from jobs.evaluation.gate import Checks, Judged, Measurement, judge
from jobs.evaluation.health import output_faults, weight_faults
from jobs.evaluation.intervals import Interval, bootstrapped_mean, median_ratio
from jobs.evaluation.latency import Latency, compare_latency
from jobs.evaluation.quality import sequence_losses
from jobs.evaluation.recording import record_verdict
from jobs.models import _hf
from jobs.registry import find_model

_LATENCY_CONTEXT = 128
_LATENCY_TOKENS = 4
_LATENCY_ROUNDS = 24
_PROMPT_TOKENS = 64
_LOOKED_AT = 8  # sequences on which every layer's outputs are looked at


class Evaluation(Judged):
    """What was measured and the verdict."""

    latency: Latency
    base_latency: Latency

    def measured(self) -> dict[str, Any]:
        """Return weights in memory and rates of both models."""
        return {
            "weight_bytes_in_memory": self.latency.weight_bytes,
            "base_weight_bytes_in_memory": self.base_latency.weight_bytes,
            "tokens_per_s": self.latency.tokens_per_s,
            "base_tokens_per_s": self.base_latency.tokens_per_s,
        }


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure both models on the same held-out sequences and judge; digests are checked first.

    A refusal is a result, not an error. Raises ModelNotFoundError, ModelFormatError, DataError or
    IntegrityError for what cannot be measured.
    """
    model, base = _paths(config)
    split = _held_out(config, base)
    manifest = verify_directory(model)
    loaded, base_loaded = load_model(model, verify=False), load_model(base)
    _check_same_vocabulary(loaded.config, base_loaded.config, split)
    sequences = split.sample(config.gate.eval_sequences, config.seq_len, config.gate.seed)
    latency, base_latency = time_beside(loaded, base_loaded)
    measured = Measurement.from_losses(
        sequence_losses(base_loaded.model, sequences, kv_cache=base_loaded.kv_cache),
        sequence_losses(loaded.model, sequences, kv_cache=loaded.kv_cache),
        config.gate,
        size_bytes=weight_file_bytes(model),
        base_size_bytes=predicted_bytes(base_loaded.config, Recipe()),
        **dict(check(loaded, base_loaded, (latency, base_latency), sequences, config.gate)),
        faults=find_faults(model, loaded, sequences, (base, base_loaded)),
    )
    verdict = judge(measured, config.gate)
    verdict = verdict.replace(measured_on=_measured_on(config, split, base))
    if config.record:
        record_verdict(model, manifest, verdict)
    return Evaluation(
        model=model, base=base, verdict=verdict, latency=latency, base_latency=base_latency
    )


def plan_rows(config: EvaluateConfig) -> list[tuple[str, str]]:
    """Return what would be measured, without loading weights."""
    model, base = _paths(config)
    split = _held_out(config, base)
    return [
        ("model", str(model)),
        ("base", str(base)),
        ("data", f"{split.folder}, split {config.split}"),
        ("sequences", f"{config.gate.eval_sequences} of {config.seq_len} tokens"),
        ("writes the verdict", str(model / MANIFEST) if config.record else "no"),
    ]


def time_beside(loaded: LoadedModel, base: LoadedModel) -> tuple[Latency, Latency]:
    """Time decoding of both models in turns, one sequence behind 128 tokens if they hold that."""
    longest = min(loaded.config.max_seq_len, base.config.max_seq_len)
    tokens = max(1, min(_LATENCY_TOKENS, longest // 2))
    context = max(1, min(_LATENCY_CONTEXT, longest - tokens))
    latency, base_latency = compare_latency(
        [loaded.model, base.model],
        context=context,
        tokens=tokens,
        kv_caches=[loaded.kv_cache, base.kv_cache],
        repeats=_LATENCY_ROUNDS,
    )
    return latency, base_latency


def check(
    loaded: LoadedModel,
    base: LoadedModel,
    times: tuple[Latency, Latency],
    sequences: NDArray[np.int64],
    limits: GateConfig,
) -> Checks:
    """Return what the gate judges of speed and answers, on held-out sequences [N, T + 1]."""
    latency, base_latency = times
    change = median_ratio(np.asarray(base_latency.rounds_ms), np.asarray(latency.rounds_ms))
    return Checks(
        latency_ms=latency.p50_ms,
        base_latency_ms=base_latency.p50_ms,
        latency_change=change,
        agreement=measure_agreement(loaded, base, sequences, limits),
        agreement_prompts=min(len(sequences), limits.agreement_prompts),
    )


def find_faults(
    directory: Path,
    loaded: LoadedModel,
    sequences: NDArray[np.int64],
    base: tuple[Path, LoadedModel] | None = None,
) -> tuple[str, ...]:
    """Return what is broken about a model's tensors and its outputs on some sequences.

    Zeros that the base has, too, are none of its faults.
    """
    origin, base_loaded = base or (None, None)
    base_model = None if base_loaded is None else base_loaded.model
    faults = output_faults(loaded.model, sequences[:_LOOKED_AT], base_model)
    return (*weight_faults(directory, origin), *faults)


def measure_agreement(
    loaded: LoadedModel, base: LoadedModel, sequences: NDArray[np.int64], limits: GateConfig
) -> Interval:
    """Return the share of equal greedy choices after beginnings of sequences [N, T + 1].

    At most half of a sequence is the prompt, 64 tokens at most, and half the continuation.
    """
    half = max(1, (sequences.shape[1] - 1) // 2)
    prompts = sequences[: limits.agreement_prompts, : min(_PROMPT_TOKENS, half)]
    num_tokens = min(limits.agreement_tokens, half)
    kv_caches = (base.kv_cache, loaded.kv_cache)
    shares = greedy_agreement(base.model, loaded.model, prompts, num_tokens, kv_caches)
    return bootstrapped_mean(shares, samples=limits.bootstrap_samples, seed=limits.seed)


def weight_file_bytes(directory: Path) -> int:
    """Return the size of all safetensors files of a model directory, in bytes."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _measured_on(config: EvaluateConfig, split: TokenSplit, base: Path) -> dict[str, str | int]:
    """Return what a verdict depends on beside its limits; digests, since folders move."""
    return {
        "base_sha256": read_manifest(base)["self_sha256"],
        "data_sha256": read_manifest(split.folder)["self_sha256"],
        "split": config.split,
        "seq_len": config.seq_len,
        "threads": torch.get_num_threads(),
    }


def _paths(config: EvaluateConfig) -> tuple[Path, Path]:
    base = resolve_output(config.base)
    if not base.is_dir():
        raise ModelFormatError(f"`base` = {config.base}: no such directory.")
    resolved = resolve_output(config.model)
    if resolved.is_dir():
        return resolved, base
    if config.record:
        raise ConfigError(
            f"`record` = true and `model` = {config.model} is no directory: what is published is "
            "never changed. Give the directory, before publishing."
        )
    return find_model(config.model, resolve_output(config.registry)), base


def _held_out(config: EvaluateConfig, base: Path) -> TokenSplit:
    split = open_split(resolve_output(config.data), config.split)
    max_seq_len = _hf.from_hf_config(_hf.read_config(base)).max_seq_len
    if config.seq_len > max_seq_len:
        raise ConfigError(
            f"`seq_len` = {config.seq_len} exceeds the model's {max_seq_len} positions. Lower it."
        )
    found, wanted = split.num_sequences(config.seq_len), config.gate.eval_sequences
    if found < wanted:
        raise ConfigError(
            f"`gate.eval_sequences` = {wanted}, and the {config.split} split of {split.folder} has "
            f"{found} of seq_len={config.seq_len}. Lower it or give more data."
        )
    return split


def _check_same_vocabulary(config: DecoderConfig, base: DecoderConfig, split: TokenSplit) -> None:
    if not config.vocab_size == base.vocab_size >= split.vocab_size:
        raise ConfigError(
            f"the model has {config.vocab_size} ids, the base {base.vocab_size} and the data "
            f"{split.vocab_size}: they do not belong together."
        )
