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
from cluster.storage import MANIFEST, resolve_output, staged_directory, verify_directory
from jobs.compression import quantization_config
from jobs.compression.encoders import save_encoder
from jobs.compression.packing import copy_companions, save_compressed
from jobs.compression.recipe import (
    Compressed,
    apply_recipe,
    layouts,
    needs_text,
    predicted_bytes,
)
from jobs.compression.text import open_text, read_text
from jobs.config import CompressConfig, DecoderConfig, Recipe
from jobs.entry import Job, Rows, run_job
from jobs.models import _hf, decoder, encoder
from jobs.models.decoder import Decoder
from jobs.models.encoder import EncoderConfig, is_encoder
from jobs.registry import find_model


def compress(config: CompressConfig) -> Path:
    """Write the compressed model and return its directory; nothing is left on any failure.

    A source with a manifest is checked against it first. Raises VersionExistsError if the output
    exists, ModelNotFoundError or ModelFormatError for the source, RecipeError for the recipe.
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
    with staged_directory(target, manifest) as staging:
        if isinstance(shape, EncoderConfig):
            copy_companions(source, staging)
            save_encoder(apply_recipe(encoder.load(source), config.recipe), staging)
        else:
            save_compressed(_apply(config, source, shape), staging)
            copy_companions(source, staging)
    return target


def _apply(config: CompressConfig, source: Path, shape: DecoderConfig) -> Compressed[Decoder]:
    """Apply the recipe with its text, if it needs any, and show how far it is."""
    has_text = config.calibration is not None
    text_NT = None
    if needs_text(shape, config.recipe, has_text=has_text) and config.calibration is not None:
        text_NT = read_text(config.calibration, source, shape)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compressing", total=None)
        return apply_recipe(
            decoder.load(source),
            config.recipe,
            text_NT,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def plan_rows(config: CompressConfig) -> Rows:
    """Return what would be written and how large it is, without reading weights."""
    source, target = _paths(config)
    shape = _shape(source)
    dense_bytes = predicted_bytes(shape, Recipe())
    small_bytes = predicted_bytes(shape, config.recipe)
    schemes = [layout.scheme for layout in layouts(shape, config.recipe).values()]
    counts = ", ".join(f"{schemes.count(s)} {s}" for s in sorted(set(schemes)))
    text = config.calibration
    if needs_text(shape, config.recipe, has_text=text is not None) and text is not None:
        assert isinstance(shape, DecoderConfig), "encoders need no text"
        split = open_text(text, source, shape)
        calibration = f"{text.num_sequences} sequences of {text.seq_len} tokens of {split.folder}"
    else:
        calibration = "no text is needed"
    return [
        ("model", str(source)),
        ("output", str(target)),
        ("linear layers", counts),
        ("calibration", calibration),
        ("weights, bytes", f"{small_bytes:,}"),
        ("share of bf16", f"{small_bytes / dense_bytes:.1%}"),
    ]


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
