"""A search as a value: what it reads, tries and writes, checked before anything is started.

Takes a SearchConfig; gives a Search and the rows that `--dry-run` prints. It starts and writes
nothing.
"""

import math
from collections.abc import Sequence
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
from jobs.compression.recipe import text_needs
from jobs.compression.text import check_need, open_text
from jobs.config import DecoderConfig, Recipe, SearchConfig
from jobs.data.tokens import open_split
from jobs.models import _hf
from jobs.search.space import Assignment, Space, build_space, layout_of
from jobs.search.tasks import Task
from jobs.search.trial import Format, TrialSpec

_NOT_IN_FINGERPRINT = {"output_dir", "max_concurrent_trials", "served_finalists"}


@dataclass(frozen=True)
class Search:
    """Everything a search needs; candidate 0 is the unchanged model."""

    config: SearchConfig
    run_dir: Path
    model: Path
    data: Path
    space: Space
    fingerprint: str

    def spec(self, task: Task, candidates: Sequence[Assignment]) -> TrialSpec:
        """Return what a task measures; the gate sees the test split, all else validation."""
        config = self.config
        spec = TrialSpec(
            stage=task.stage,
            model=self.model,
            data=self.data,
            seq_len=config.seq_len,
            seed=config.seed,
            workload=config.workload,
            calibration=config.calibration,
        )
        if task.stage == "times":
            return spec.replace(formats=self._formats())
        if task.stage == "probe":
            group = self.space.groups[task.number]
            return spec.replace(
                alone=tuple(self._alone(task.number, c) for c in range(len(self.space.choices))),
                first_block=group.first,
                num_sequences=config.probe_sequences,
            )
        is_gate = task.stage == "gate"
        is_real = is_gate or config.rungs[task.rung].real
        assignment = candidates[task.number]
        return spec.replace(
            recipe=self.space.recipe(assignment, real=is_real),
            split="test" if is_gate else "validation",
            num_sequences=(
                config.gate.eval_sequences if is_gate else config.rungs[task.rung].eval_sequences
            ),
            packed=self.packed(task.number) if is_real else None,
            times_request=is_real and bool(assignment),
            gate=config.gate if is_gate else None,
        )

    def packed(self, candidate: int) -> Path:
        """Return where a candidate's model directory is written."""
        return self.run_dir / "trials" / f"{candidate:03d}"

    def _formats(self) -> tuple[Format, ...]:
        layouts = [layout_of(each.scheme, self.space.decoder) for each in self.space.choices]
        return tuple(
            Format(scheme=layout.scheme, group_size=layout.group_size)
            for layout in dict.fromkeys(layouts)
        )

    def _alone(self, group: int, choice: int) -> Recipe:
        """Return the recipe that makes one choice for one group and leaves the others."""
        return self.space.alone(group, choice)


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
    space = build_space(config, decoder)
    if config.calibration is not None:
        split = open_text(config.calibration, model, decoder)
        last = space.recipe(space.uniform(len(space.choices) - 1), real=True)
        for place, need in text_needs(decoder, last).items():
            check_need(split, need, place)
    data_digest = read_manifest(data)["self_sha256"]
    document = config.model_dump_json(exclude=_NOT_IN_FINGERPRINT)
    return Search(
        config=config,
        run_dir=resolve_output(config.output_dir) / check_name(config.name, "search name"),
        model=model,
        data=data,
        space=space,
        fingerprint=digest_bytes(f"{document}{model_digest}{data_digest}".encode()),
    )


def plan_rows(config: SearchConfig) -> list[tuple[str, str]]:
    """Return what a search will do, as names and values to print."""
    return preview_rows(config, plan_search(config).space.decoder)


def preview_rows(config: SearchConfig, decoder: DecoderConfig) -> list[tuple[str, str]]:
    """Return the same for a model of this shape that a training run has yet to write.

    Raises ConfigError for what no model of this shape and no data could mend.
    """
    _check_positions(config, decoder)
    space = build_space(config, decoder)
    choices = ", ".join(map(str, space.choices))
    rows = [
        ("model", f"{resolve_output(config.model)} ({space.base_bytes:,} bytes in bf16)"),
        ("data", str(resolve_output(config.data))),
        ("choices", f"{choices}, for each of {len(space.groups)} groups of layers"),
        ("quantizer", f"{config.quantizer} on rungs with real kernels"),
        ("measured alone", f"each choice of each group, {config.probe_sequences} sequences"),
        (
            "trials",
            f"at most {config.num_trials} in {config.generations} generations, "
            f"{config.max_concurrent_trials} at a time",
        ),
    ]
    alive = config.num_trials
    for number, rung in enumerate(config.rungs):
        kind = "real kernels" if rung.real else "rounded weights"
        rows.append((f"rung {number}", f"{alive} trials, {rung.eval_sequences} sequences, {kind}"))
        alive = max(1, math.ceil(alive * rung.keep_ratio))
    rows.append(("gate", _gate_text(config)))
    limits = config.limits.model_dump(exclude_none=True)
    rows += [(f"limits.{name}", f"{value:,}") for name, value in limits.items()]
    for choice in range(len(space.choices)):
        uniform = space.uniform(choice)
        ratio = space.size_bytes(uniform) / space.base_bytes
        rows.append((f"{space.describe(uniform)}", f"{ratio:.1%} of the bytes"))
    return rows


def _check_positions(config: SearchConfig, decoder: DecoderConfig) -> None:
    if config.seq_len > decoder.max_seq_len:
        raise ConfigError(
            f"`seq_len` = {config.seq_len} exceeds the model's {decoder.max_seq_len} positions. "
            "Lower `seq_len`."
        )
    asked = config.workload.prompt_tokens + config.workload.output_tokens
    if asked > decoder.max_seq_len:
        raise ConfigError(
            f"`workload` asks for {config.workload.prompt_tokens} + "
            f"{config.workload.output_tokens} tokens, and the model has {decoder.max_seq_len} "
            "positions. Lower `workload.prompt_tokens` or `workload.output_tokens`."
        )


def _check_data(config: SearchConfig, data: Path, decoder: DecoderConfig) -> None:
    _check_positions(config, decoder)
    needed = {
        "validation": max(config.probe_sequences, *(rung.eval_sequences for rung in config.rungs)),
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
