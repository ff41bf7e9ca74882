"""A search as a value: what it reads, tries and writes, checked before anything is started.

Takes a SearchConfig; gives a Search and the rows that `--dry-run` prints. It starts and writes
nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError, ModelFormatError
from cluster.storage import (
    check_name,
    digest_bytes,
    read_manifest,
    resolve_output,
    verify_directory,
)
from jobs.compression.recipe import predicted_bytes
from jobs.config import DecoderConfig, Recipe, SearchConfig
from jobs.data.tokens import open_split
from jobs.models import _hf
from jobs.search.rungs import BASE, Task
from jobs.search.space import describe, layer_groups, proposals
from jobs.search.trial import TrialSpec

_NOT_IN_FINGERPRINT = {"output_dir", "max_concurrent_trials", "cpus_per_trial"}


@dataclass(frozen=True)
class Search:
    """Everything a search needs; candidate 0 is the unchanged model."""

    config: SearchConfig
    run_dir: Path
    model: Path
    data: Path
    decoder: DecoderConfig
    recipes: tuple[Recipe, ...]
    base_bytes: int
    fingerprint: str

    def spec(self, task: Task) -> TrialSpec:
        """Return what a task measures; the gate sees the test split, rungs see validation."""
        config = self.config
        is_gate = task.rung == len(config.rungs)
        is_real = is_gate or config.rungs[task.rung].real
        return TrialSpec(
            model=self.model,
            data=self.data,
            recipe=self.recipes[task.candidate],
            split="test" if is_gate else "validation",
            num_sequences=(
                config.gate.eval_sequences if is_gate else config.rungs[task.rung].eval_sequences
            ),
            seq_len=config.seq_len,
            seed=config.seed,
            packed=self.packed(task.candidate) if is_real else None,
            times_latency=is_real and task.candidate != BASE,
        )

    def packed(self, candidate: int) -> Path:
        """Return where a candidate's model directory is written."""
        return self.run_dir / "trials" / f"{candidate:03d}"


def plan_search(config: SearchConfig) -> Search:
    """Check the model, the data and the space, digests included.

    Raises ModelFormatError, DataError, ConfigError or IntegrityError saying what to correct.
    """
    model, data = resolve_output(config.model), resolve_output(config.data)
    if not model.is_dir():
        raise ModelFormatError(f"`model` = {config.model}: no such directory. Train one first.")
    model_digest = verify_directory(model)["self_sha256"]
    decoder = _hf.from_hf_config(_hf.read_config(model))
    _check_data(config, data, decoder)
    recipes = _recipes(config, decoder)
    data_digest = read_manifest(data)["self_sha256"]
    document = config.model_dump_json(exclude=_NOT_IN_FINGERPRINT)
    return Search(
        config=config,
        run_dir=resolve_output(config.output_dir) / check_name(config.name, "search name"),
        model=model,
        data=data,
        decoder=decoder,
        recipes=recipes,
        base_bytes=predicted_bytes(decoder, Recipe()),
        fingerprint=digest_bytes(f"{document}{model_digest}{data_digest}".encode()),
    )


def plan_rows(config: SearchConfig) -> list[tuple[str, str]]:
    """Return what a search will do, as names and values to print."""
    return preview_rows(config, plan_search(config).decoder)


def preview_rows(config: SearchConfig, decoder: DecoderConfig) -> list[tuple[str, str]]:
    """Return the same for a model of this shape that a training run has yet to write.

    Raises ConfigError for what no model of this shape and no data could mend.
    """
    _check_positions(config, decoder)
    recipes = _recipes(config, decoder)
    base_bytes = predicted_bytes(decoder, Recipe())
    rows = [
        ("model", f"{resolve_output(config.model)} ({base_bytes:,} bytes in bf16)"),
        ("data", str(resolve_output(config.data))),
        ("layer groups", str(len(layer_groups(decoder, config.layers_per_group)))),
        ("trials", f"{len(recipes)}, {config.max_concurrent_trials} at a time"),
    ]
    alive = len(recipes) - 1
    for number, rung in enumerate(config.rungs):
        kind = "real kernels" if rung.real else "rounded weights"
        rows.append((f"rung {number}", f"{alive} trials, {rung.eval_sequences} sequences, {kind}"))
        alive = max(1, math.ceil(alive * rung.keep_ratio))
    rows.append(("gate", _gate_text(config)))
    for number, recipe in enumerate(recipes):
        ratio = predicted_bytes(decoder, recipe) / base_bytes
        rows.append((f"trial {number}", f"{describe(recipe)} ({ratio:.1%} of the bytes)"))
    return rows


def _recipes(config: SearchConfig, decoder: DecoderConfig) -> tuple[Recipe, ...]:
    """Return the candidates, the unchanged model first."""
    recipes = (Recipe(), *(each for each in proposals(config, decoder) if each.steps))
    if len(recipes) == 1:
        raise ConfigError(
            f"`schemes` = {config.schemes} and `sparsities` = {config.sparsities} leave nothing to "
            "try but the unchanged model. Add a scheme."
        )
    return recipes


def _check_positions(config: SearchConfig, decoder: DecoderConfig) -> None:
    if config.seq_len > decoder.max_seq_len:
        raise ConfigError(
            f"`seq_len` = {config.seq_len} exceeds the model's {decoder.max_seq_len} positions. "
            "Lower `seq_len`."
        )


def _check_data(config: SearchConfig, data: Path, decoder: DecoderConfig) -> None:
    _check_positions(config, decoder)
    needed = {
        "validation": max(rung.eval_sequences for rung in config.rungs),
        "test": config.gate.eval_sequences,
    }
    for name, num_sequences in needed.items():
        split = open_split(data, name)  # type: ignore[arg-type]  # keys are splits
        found = split.num_sequences(config.seq_len)
        if found < num_sequences:
            raise ConfigError(
                f"{num_sequences} sequences of the {name} split are asked for, and {data} has "
                f"{found} of seq_len={config.seq_len}. Lower `eval_sequences` or give more data."
            )
        if split.vocab_size > decoder.vocab_size:
            raise ConfigError(
                f"{data} was tokenized with {split.vocab_size} ids, the model has "
                f"{decoder.vocab_size}. Give the data the model was trained on."
            )


def _gate_text(config: SearchConfig) -> str:
    gate = config.gate
    text = (
        f"perplexity increase at most {gate.max_perplexity_increase:.1%} (upper 95% bound, "
        f"{gate.eval_sequences} test sequences), size at most {gate.max_size_ratio:.0%}"
    )
    if gate.max_latency_ratio is None:
        return text
    return f"{text}, latency at most {gate.max_latency_ratio:.2f} of the bf16 model's"
