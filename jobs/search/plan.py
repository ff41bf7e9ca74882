"""A search as a value: what it reads, tries and writes, checked before anything is started.

Takes a SearchConfig; gives a Search and the rows that `--dry-run` prints. It starts and writes
nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, ModelFormatError
from cluster.storage import (
    check_name,
    digest_bytes,
    read_manifest,
    resolve_output,
    verify_directory,
)
from jobs.compression.recipe import text_needs
from jobs.compression.text import check_needs, open_text
from jobs.config import CalibrationConfig, DecoderConfig, SearchConfig
from jobs.data.tokens import Split, open_split
from jobs.models import _hf
from jobs.search.space import Assignment, Space, build_space, layout_of
from jobs.search.tasks import Task
from jobs.search.trial import Format, TrialSpec

# Asked of Ray Serve: some warm up, and an answer that ends early does not count.
LEAST_PROMPTS = 24
_NOT_IN_FINGERPRINT: dict[str, Any] = {
    "output_dir": True,
    "max_concurrent_trials": True,
    "served_finalists": True,
    "calibration": {"cache"},
}
_FORMAT = 2  # Of results: those of another meaning are another search's.


@dataclass(frozen=True)
class Search:
    """Everything a search needs."""

    config: SearchConfig
    run_dir: Path
    model: Path
    data: Path
    space: Space
    fingerprint: str

    def spec(self, task: Task) -> TrialSpec:
        """Return what a task measures; the gate sees the test split, all else validation."""
        config = self.config
        spec = TrialSpec(
            stage=task.stage,
            model=self.model,
            data=self.data,
            seq_len=config.seq_len,
            seed=config.seed,
            workload=config.workload,
            calibration=self.calibration,
        )
        if task.stage == "times":
            return spec.replace(formats=self._formats(), kv_cache=config.kv_cache)
        if task.stage == "probe":
            return spec.replace(**self._probe(task))
        is_gate = task.stage == "gate"
        is_real = task.stage != "rung" or config.rungs[task.rung].real
        spec = spec.replace(
            recipe=self.space.recipe(task.assignment, real=is_real),
            packed=self.packed(task.assignment) if is_real else None,
        )
        if is_gate:
            return spec.replace(
                split="test",
                num_sequences=config.gate.eval_sequences,
                seed=config.gate.seed,
                gate=config.gate if task.assignment else None,
            )
        return spec.replace(num_sequences=config.rungs[task.rung].eval_sequences)

    def packed(self, assignment: Assignment) -> Path:
        """Return where a model's directory is written, by what is done to it."""
        name = digest_bytes(bytes(assignment))[:12]
        return self.run_dir / "trials" / name

    @property
    def statistics(self) -> Path:
        """Where statistics of the unchanged model are while it searches."""
        return self.run_dir / "statistics"

    @property
    def calibration(self) -> CalibrationConfig | None:
        """The config's, its folders found from any process."""
        given = self.config.calibration
        if given is None:
            return None
        cache = given.cache
        if not given.sequential:  # Trials share what is computed of the unchanged model.
            cache = str(self.statistics if cache is None else resolve_output(cache))
        return given.replace(data=str(resolve_output(given.data)), cache=cache)

    def _probe(self, task: Task) -> dict[str, Any]:
        assert task.group is not None, "a probe is of a group"
        choices = range(len(self.space.choices))
        return {
            "alone": tuple(self.space.alone(task.group, choice) for choice in choices),
            "first_block": self.space.groups[task.group].first,
            "num_sequences": self.config.probe_sequences,
        }

    def _formats(self) -> tuple[Format, ...]:
        layouts = [layout_of(each.scheme, self.space.decoder) for each in self.space.choices]
        return tuple(
            Format(scheme=layout.scheme, group_size=layout.group_size)
            for layout in dict.fromkeys(layouts)
        )


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
    _check_prompts(config, data)
    space = build_space(config, decoder)
    text_digest = ""
    if config.calibration is not None:
        split = open_text(config.calibration, model, decoder)
        text_digest = read_manifest(split.folder)["self_sha256"]
        last = space.recipe(space.uniform(len(space.choices) - 1), real=True)
        check_needs(split, text_needs(decoder, last))
    data_digest = read_manifest(data)["self_sha256"]
    document = config.model_dump_json(exclude=_NOT_IN_FINGERPRINT)
    return Search(
        config=config,
        run_dir=resolve_output(config.output_dir) / check_name(config.name, "search name"),
        model=model,
        data=data,
        space=space,
        fingerprint=digest_bytes(
            f"{_FORMAT}{document}{model_digest}{data_digest}{text_digest}".encode()
        ),
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
    rows.append(("Ray Serve", f"times {config.served_finalists} of the front, on CPUs as trials"))
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
    needed: list[tuple[str, Split, int]] = [
        ("probe_sequences", "validation", config.probe_sequences),
        *(
            (f"rungs[{number}].eval_sequences", "validation", rung.eval_sequences)
            for number, rung in enumerate(config.rungs)
        ),
        ("gate.eval_sequences", "test", config.gate.eval_sequences),
    ]
    for key, name, num_sequences in needed:
        split = open_split(data, name)
        found = split.num_sequences(config.seq_len)
        if found < num_sequences:
            raise ConfigError(
                f"`{key}` = {num_sequences} asks for sequences of the {name} split, and {data} has "
                f"{found} of seq_len={config.seq_len}. Lower `{key}` or give more data."
            )
        if split.vocab_size > decoder.vocab_size:
            raise ConfigError(
                f"{data} was tokenized with {split.vocab_size} ids, the model has "
                f"{decoder.vocab_size}. Give the data the model was trained on."
            )


def _check_prompts(config: SearchConfig, data: Path) -> None:
    prompts = open_split(data, "validation").num_sequences(config.workload.prompt_tokens)
    if config.served_finalists and prompts < LEAST_PROMPTS:
        raise ConfigError(
            f"`served_finalists` asks Ray Serve at least {LEAST_PROMPTS} different prompts, and "
            f"the validation split of {data} has {prompts} of workload.prompt_tokens="
            f"{config.workload.prompt_tokens}. Lower that, or set `served_finalists` to 0."
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
