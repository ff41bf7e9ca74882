"""`python -m jobs.compress --config f.yaml`: apply one recipe to one model.

Takes a CompressConfig; gives a new model directory with packed weights, the dense model's
tokenizer, and a manifest that says where it came from. Whether it is any good is for evaluation.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cluster.errors import ModelFormatError, VersionExistsError
from cluster.session import connect
from cluster.storage import MANIFEST, resolve_output, staged_directory, verify_directory
from jobs.compression import quantization_config
from jobs.compression.calibration import Scratch
from jobs.compression.encoders import save_encoder
from jobs.compression.layer_work import InProcess, LayerWorkers
from jobs.compression.packing import copy_companions, save_compressed
from jobs.compression.recipe import (
    Compressed,
    apply_recipe,
    layouts,
    needs_text,
    predicted_bytes,
    text_needs,
)
from jobs.compression.text import check_needs, open_text, read_text
from jobs.config import CompressConfig, DecoderConfig, Recipe
from jobs.data.tokens import TokenSplit
from jobs.entry import Job, Rows, run_job
from jobs.models import _hf, decoder, encoder
from jobs.models.decoder import Decoder
from jobs.models.encoder import EncoderConfig, is_encoder
from jobs.registry import find_model


def compress(config: CompressConfig) -> Path:
    """Write the compressed model and return its directory; nothing is left on any failure.

    A source with a manifest is checked against it first. Raises VersionExistsError if the output
    exists, ModelNotFoundError or ModelFormatError for the source, RecipeError for the recipe,
    ClusterError or PlacementError if there are several workers and no cluster that has them.
    """
    source, target = _paths(config)
    shape = _shape(source)
    # A wrong recipe fails before weights are read.
    predicted = predicted_bytes(shape, config.recipe)
    parent = _parent(source)
    manifest = {
        "kind": "model",
        "recipe": config.recipe.model_dump(mode="json"),
        "metrics": {"weight_bytes": predicted},
        "lineage": {
            **parent.get("lineage", {}),
            "parent": config.model,
            "parent_digest": parent.get("self_sha256"),
        },
    }
    workers = _workers(config.workers)
    with staged_directory(target, manifest) as staging:
        if isinstance(shape, EncoderConfig):
            copy_companions(source, staging)
            dense = encoder.load(source)
            save_encoder(apply_recipe(dense, config.recipe, workers=workers), staging)
        else:
            scratch = Scratch(target.parent)  # A disk that is meant for models, unlike /tmp.
            save_compressed(_apply(config, source, shape, workers, scratch), staging)
            copy_companions(source, staging)
    return target


def _apply(
    config: CompressConfig,
    source: Path,
    shape: DecoderConfig,
    workers: LayerWorkers,
    scratch: Scratch,
) -> Compressed[Decoder]:
    """Apply the recipe with its text, if it needs any, and show how far it is."""
    split = _text_split(config, source, shape)
    text = None
    if split is not None and config.calibration is not None:
        text = read_text(config.calibration, split)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compressing", total=None)
        return apply_recipe(
            decoder.load(source),
            config.recipe,
            text,
            lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
            workers,
            scratch,
        )


def _workers(num_workers: int) -> LayerWorkers:
    if num_workers == 1:
        return InProcess()
    connect()
    from jobs.layer_workers import RayWorkers  # deferred: most runs need no Ray

    return RayWorkers(num_workers)


def plan_rows(config: CompressConfig) -> Rows:
    """Return what would be written and how large it is, without reading weights."""
    source, target = _paths(config)
    shape = _shape(source)
    dense_bytes = predicted_bytes(shape, Recipe())
    small_bytes = predicted_bytes(shape, config.recipe)
    schemes = [layout.scheme for layout in layouts(shape, config.recipe).values()]
    counts = ", ".join(f"{schemes.count(s)} {s}" for s in sorted(set(schemes)))
    workers = f"{config.workers} layers of a block at a time, as Ray tasks"
    return [
        ("model", str(source)),
        ("output", str(target)),
        ("linear layers", counts),
        ("keys and values", config.recipe.kv_cache),
        *_text_rows(config, source, shape),
        *([("workers", workers)] if config.workers > 1 else []),
        ("weights, bytes", f"{small_bytes:,}"),
        ("share of bf16", f"{small_bytes / dense_bytes:.1%}"),
    ]


def _text_rows(config: CompressConfig, source: Path, shape: DecoderConfig | EncoderConfig) -> Rows:
    split, text = _text_split(config, source, shape), config.calibration
    if split is None or text is None:
        return [("calibration", "no text is needed")]
    seen = f"{text.num_sequences} sequences of {text.seq_len} tokens of {split.folder}"
    rows = [("calibration", seen)]
    for place, need in text_needs(shape, config.recipe).items():
        num_tokens = need.num_sequences * need.seq_len
        rows.append((place, f"trains on {num_tokens:,} of {split.num_tokens:,} tokens"))
    return rows


def _text_split(
    config: CompressConfig, source: Path, shape: DecoderConfig | EncoderConfig
) -> TokenSplit | None:
    """Return the text that the recipe sees, checked to suffice; None if it needs none."""
    text = config.calibration
    if not needs_text(shape, config.recipe, has_text=text is not None) or text is None:
        return None
    assert isinstance(shape, DecoderConfig), "encoders need no text"
    split = open_text(text, source, shape)
    check_needs(split, text_needs(shape, config.recipe))
    return split


def main(argv: Sequence[str] | None = None) -> int:
    """Compress a model; return the exit code."""
    return run_job(JOB, argv)


def _run(config: CompressConfig) -> Mapping[str, Any]:
    shape = _shape(_paths(config)[0])
    target = compress(config)
    size_bytes = predicted_bytes(shape, config.recipe)
    return {
        "model": str(target),
        "weight_bytes": size_bytes,
        "size_ratio": size_bytes / predicted_bytes(shape, Recipe()),
    }


def _paths(config: CompressConfig) -> tuple[Path, Path]:
    source, target = resolve_output(config.model), resolve_output(config.output)
    if target.exists():
        raise VersionExistsError(
            f"`output` = {target} exists and is never overwritten. Choose another name."
        )
    if not source.is_dir():
        source = find_model(config.model, resolve_output(config.registry))
    return source, target


def _shape(directory: Path) -> DecoderConfig | EncoderConfig:
    document = _hf.read_config(directory)
    if quantization_config.KEY in document:
        origin = _parent(directory).get("lineage", {}).get("parent")
        raise ModelFormatError(
            f"`model` = {directory} is quantized already, and a recipe starts from dense weights. "
            f"Give the model that it was made from{f': {origin}' if origin else ''}."
        )
    if is_encoder(document):
        return encoder.read_config(directory)
    return _hf.from_hf_config(document)


def _parent(source: Path) -> dict[str, Any]:
    """Return the source's manifest, checked; empty for a plain Hugging Face directory."""
    return verify_directory(source) if (source / MANIFEST).is_file() else {}


JOB = Job(
    name="compress",
    help="Apply one compression recipe to one model.",
    config=CompressConfig,
    plan=plan_rows,
    run=_run,
)

if __name__ == "__main__":
    sys.exit(main())
