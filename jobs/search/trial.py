"""Carry out one task of a search: time kernels, measure choices alone, or score one recipe.

Takes a TrialSpec, all of it values and paths; gives a Result. It reads the dense model and the
packed data from disk and knows neither Ray nor which trials there are.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.config import StrictModel
from cluster.errors import ModelFormatError, RecipeError
from cluster.storage import read_manifest, staged_directory
from jobs.compression.packing import (
    LoadedModel,
    copy_companions,
    load_model,
    save_compressed,
)
from jobs.compression.recipe import Compressed, apply_recipe, needs_text, predicted_bytes
from jobs.compression.text import open_text, read_text
from jobs.config import CalibrationConfig, GateConfig, KvCache, Recipe, Workload
from jobs.data.tokens import Split, open_split
from jobs.evaluation.compare import check, find_faults, time_beside, weight_file_bytes
from jobs.evaluation.kernel_times import kernel_times
from jobs.evaluation.latency import request_times
from jobs.evaluation.quality import sequence_losses
from jobs.kernels.formats import Layout, Scheme
from jobs.models import _hf, decoder
from jobs.models.decoder import Decoder
from jobs.search.probe import divergences
from jobs.search.tasks import Result, Stage

_REPEATS = 8  # As many forwards as backwards.


class Format(StrictModel):
    """A format whose kernels are timed."""

    scheme: Scheme
    group_size: int | None = None

    def layout(self) -> Layout:
        """Return it as kernels know it."""
        return Layout(self.scheme, self.group_size)


class TrialSpec(StrictModel):
    """What one trial does.

    With `packed` the recipe is written there as a model directory, unless it is there already, and
    the real kernels are measured; without it, weights are only rounded.
    """

    stage: Stage
    model: Path
    data: Path
    seq_len: int
    seed: int
    workload: Workload
    recipe: Recipe = Recipe()
    calibration: CalibrationConfig | None = None
    split: Split = "validation"
    num_sequences: int = 1
    packed: Path | None = None
    gate: GateConfig | None = None
    """At the stage `gate`: what is judged there is measured."""
    formats: tuple[Format, ...] = ()
    kv_cache: KvCache = "auto"
    """At the stage `times`: what is timed."""
    alone: tuple[Recipe, ...] = ()
    """At the stage `probe`: what is done to one group, whose first block is `first_block`."""
    first_block: int = 0


def run_trial(spec: TrialSpec) -> Result:
    """Return what was measured; a recipe that does not fit the model gives a Result with `error`.

    Damaged files, missing data and a full disk raise: they are no property of the recipe.
    """
    began = time.perf_counter()
    try:
        result = _run(spec)
    except (RecipeError, ModelFormatError) as error:
        result = Result(error=error.message)
    return result.replace(seconds=time.perf_counter() - began)


def _run(spec: TrialSpec) -> Result:
    if spec.stage == "times":
        shape = _hf.from_hf_config(_hf.read_config(spec.model))
        layouts = [each.layout() for each in spec.formats]
        return Result(times=kernel_times(spec.model, shape, layouts, spec.workload, spec.kv_cache))
    if spec.stage == "probe":
        tokens_BT = torch.from_numpy(_sequences(spec)[:, :-1].copy())
        dense = decoder.load(spec.model)
        return Result(divergences=divergences(dense, spec.alone, spec.first_block, tokens_BT))
    if spec.stage == "request":
        return _time_requests(spec)
    return _score_packed(spec) if spec.packed is not None else _score_rounded(spec)


def _score_rounded(spec: TrialSpec) -> Result:
    shape = _hf.from_hf_config(_hf.read_config(spec.model))
    size_bytes = predicted_bytes(shape, spec.recipe)
    model = _compress(spec).model
    losses = sequence_losses(model, _sequences(spec), kv_cache=spec.recipe.kv_cache)
    return Result(losses=tuple(losses.tolist()), size_bytes=size_bytes)


def _score_packed(spec: TrialSpec) -> Result:
    assert spec.packed is not None, "a packed trial needs a folder"
    if spec.recipe != Recipe():
        _pack(spec, spec.packed)
        loaded = load_model(spec.packed)
        size_bytes = weight_file_bytes(spec.packed)
    else:
        loaded = load_model(spec.model, verify=False)
        size_bytes = predicted_bytes(loaded.config, spec.recipe)
    losses = sequence_losses(loaded.model, _sequences(spec), kv_cache=loaded.kv_cache)
    result = Result(
        losses=tuple(losses.tolist()), size_bytes=size_bytes, memory_bytes=loaded.weight_bytes
    )
    if spec.gate is None:
        return result
    return result.replace(**_checked(spec, spec.gate, loaded))


def _time_requests(spec: TrialSpec) -> Result:
    """Time requests of a model that an earlier task has written, beside the unchanged one."""
    assert spec.packed is not None, "what is timed is what was written"
    loaded, base = load_model(spec.packed), load_model(spec.model, verify=False)
    request_ms, base_request_ms = request_times(
        [loaded.model, base.model],
        prompt_tokens=spec.workload.prompt_tokens,
        output_tokens=spec.workload.output_tokens,
        repeats=_REPEATS,
        kv_caches=[loaded.kv_cache, base.kv_cache],
    )
    return Result(
        request_ms=statistics.median(request_ms),
        base_request_ms=statistics.median(base_request_ms),
    )


def _checked(spec: TrialSpec, limits: GateConfig, loaded: LoadedModel) -> dict[str, Any]:
    """Return what the gate judges beside losses and size."""
    assert spec.packed is not None, "the gate judges what is written"
    base = load_model(spec.model, verify=False)
    sequences = _sequences(spec)
    return {
        "checks": check(loaded, base, time_beside(loaded, base), sequences, limits),
        "faults": find_faults(spec.packed, loaded, sequences, (spec.model, base)),
    }


def _sequences(spec: TrialSpec) -> NDArray[np.int64]:
    split = open_split(spec.data, spec.split, verify=False)  # checked once, by the plan
    return split.sample(spec.num_sequences, spec.seq_len, spec.seed)


def _compress(spec: TrialSpec) -> Compressed[Decoder]:
    shape = _hf.from_hf_config(_hf.read_config(spec.model))
    text = None
    if needs_text(shape, spec.recipe, has_text=spec.calibration is not None):
        assert spec.calibration is not None, "refused before"
        text = read_text(spec.calibration, open_text(spec.calibration, spec.model, shape))
    return apply_recipe(decoder.load(spec.model), spec.recipe, text)


def _pack(spec: TrialSpec, target: Path) -> None:
    manifest = {
        "kind": "model",
        "recipe": spec.recipe.model_dump(mode="json"),
        "lineage": {"parent_digest": read_manifest(spec.model)["self_sha256"]},
    }
    if target.is_dir():
        found = read_manifest(target)
        if all(found.get(key) == value for key, value in manifest.items()):
            return
    compressed = _compress(spec)
    with staged_directory(target, manifest, replace=True) as staging:
        save_compressed(compressed, staging)
        copy_companions(spec.model, staging)  # An engine can serve it as it is.
