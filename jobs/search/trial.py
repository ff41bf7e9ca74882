"""Score one recipe: apply it, and measure losses, bytes and latency.

Takes a TrialSpec, all of it values and paths; gives a Result. It reads the dense model and the
packed data from disk and knows neither Ray nor which trials there are.
"""

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.config import StrictModel
from cluster.errors import ModelFormatError, RecipeError
from cluster.storage import read_manifest, staged_directory
from jobs.compression.packing import load_model, save_compressed
from jobs.compression.recipe import apply_recipe, predicted_bytes
from jobs.config import Recipe
from jobs.data.tokens import Split, open_split
from jobs.evaluation.compare import time_beside, weight_file_bytes
from jobs.evaluation.quality import sequence_losses
from jobs.models import decoder
from jobs.search.rungs import Result


class TrialSpec(StrictModel):
    """What one trial does.

    With `packed` the recipe is written there as a model directory, unless it is there already, and
    the real kernels are measured; without it, weights are only rounded.
    """

    model: Path
    data: Path
    recipe: Recipe
    split: Split
    num_sequences: int
    seq_len: int
    seed: int
    packed: Path | None = None
    times_latency: bool = False


def run_trial(spec: TrialSpec) -> Result:
    """Return what was measured; a recipe that does not fit the model gives a Result with `error`.

    Damaged files, missing data and a full disk raise: they are no property of the recipe.
    """
    began = time.perf_counter()
    try:
        result = _score_packed(spec) if spec.packed is not None else _score_rounded(spec)
    except (RecipeError, ModelFormatError) as error:
        result = Result(error=error.message)
    return result.replace(seconds=time.perf_counter() - began)


def _score_rounded(spec: TrialSpec) -> Result:
    dense = decoder.load(spec.model)
    size_bytes = predicted_bytes(dense.config, spec.recipe)
    model = apply_recipe(dense, spec.recipe).model
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
    if not spec.times_latency:
        return result
    latency, base_latency = time_beside(loaded, load_model(spec.model, verify=False))
    return result.replace(latency_ms=latency.p50_ms, base_latency_ms=base_latency.p50_ms)


def _sequences(spec: TrialSpec) -> NDArray[np.int64]:
    split = open_split(spec.data, spec.split, verify=False)  # checked once, by the plan
    return split.sample(spec.num_sequences, spec.seq_len, spec.seed)


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
    compressed = apply_recipe(decoder.load(spec.model), spec.recipe)
    with staged_directory(target, manifest, replace=True) as staging:
        save_compressed(compressed, staging)
