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
from jobs.compression.packing import LoadedModel, load_model, save_compressed
from jobs.compression.recipe import apply_recipe, predicted_bytes
from jobs.config import Recipe
from jobs.data.tokens import Split, open_split
from jobs.evaluation.latency import Latency, compare_latency, resident_bytes
from jobs.evaluation.quality import sequence_losses
from jobs.models import decoder
from jobs.search.rungs import Result

_LATENCY_CONTEXT = 128
_LATENCY_TOKENS = 32


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


def held_out(spec: TrialSpec) -> NDArray[np.int64]:
    """Return the sequences [n, T+1] of a trial: the same for every recipe, seeded.

    A larger `num_sequences` extends a smaller one's. Fewer come back where the split has no more.
    """
    split = open_split(spec.data, spec.split, verify=False)
    total = split.num_sequences(spec.seq_len)
    order = np.random.default_rng(spec.seed).permutation(total)
    return split.sequences(order[: spec.num_sequences], spec.seq_len)


def weight_file_bytes(directory: Path) -> int:
    """Return the size of all safetensors files of a model directory, in bytes."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _score_rounded(spec: TrialSpec) -> Result:
    dense = decoder.load(spec.model)
    size_bytes = predicted_bytes(dense.config, spec.recipe)
    model = apply_recipe(dense, spec.recipe).model
    return Result(
        losses=tuple(sequence_losses(model, held_out(spec)).tolist()), size_bytes=size_bytes
    )


def _score_packed(spec: TrialSpec) -> Result:
    assert spec.packed is not None, "a packed trial needs a folder"
    if spec.recipe.steps:
        _pack(spec, spec.packed)
        loaded = load_model(spec.packed)
        size_bytes = weight_file_bytes(spec.packed)
    else:
        loaded = load_model(spec.model, verify=False)
        size_bytes = predicted_bytes(loaded.config, spec.recipe)
    losses = sequence_losses(loaded.model, held_out(spec))
    latency, base_latency = _latencies(spec, loaded) if spec.times_latency else (None, None)
    return Result(
        losses=tuple(losses.tolist()),
        size_bytes=size_bytes,
        latency_ms=latency.p50_ms if latency else None,
        base_latency_ms=base_latency.p50_ms if base_latency else None,
        memory_bytes=resident_bytes(loaded.model),
    )


def _pack(spec: TrialSpec, target: Path) -> None:
    if target.is_dir():
        found = read_manifest(target).get("recipe")
        if found == spec.recipe.model_dump(mode="json"):
            return
    compressed = apply_recipe(decoder.load(spec.model), spec.recipe)
    manifest = {
        "kind": "model",
        "recipe": spec.recipe.model_dump(mode="json"),
        "lineage": {"parent_digest": read_manifest(spec.model)["self_sha256"]},
    }
    with staged_directory(target, manifest, replace=True) as staging:
        save_compressed(compressed, staging)


def _latencies(spec: TrialSpec, loaded: LoadedModel) -> tuple[Latency, Latency]:
    base = load_model(spec.model, verify=False)
    tokens = min(_LATENCY_TOKENS, loaded.config.max_seq_len // 2)
    context = min(_LATENCY_CONTEXT, loaded.config.max_seq_len - tokens)
    latency, base_latency = compare_latency(
        [loaded.model, base.model], context=context, tokens=tokens
    )
    return latency, base_latency
