"""Widths for the MLPs of a decoder's blocks, by how much their channels matter on a text.

Takes a dense model directory and calibration text; gives widths for the method `width`. It changes
nothing: the shape stands in the recipe, before any weight is touched.
"""

from typing import Any

from cluster.errors import ConfigError, ModelFormatError
from cluster.storage import resolve_output
from jobs.compression.methods.width import mlp_importances, propose_sizes
from jobs.compression.text import open_text, read_text
from jobs.config import CalibrationConfig
from jobs.models import decoder


def propose_widths(
    model: str, calibration: CalibrationConfig, *, keep: float, multiple_of: int
) -> dict[str, Any]:
    """Return `intermediate_sizes` that keep about a share of all channels, and that share.

    Raises ConfigError for a share that is none, ModelFormatError for a directory that is no dense
    decoder, DataError for text that does not fit it, RecipeError where `multiple_of` is too large.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"`--keep` = {keep:g} is no share. Give more than 0 and at most 1.")
    if multiple_of < 1:
        raise ConfigError(f"`--multiple-of` = {multiple_of} must be at least 1.")
    source = resolve_output(model)
    if not source.is_dir():
        raise ModelFormatError(f"`--model` = {model}: no such directory. Give a dense model's.")
    dense = decoder.load(source)
    text = read_text(calibration, open_text(calibration, source, dense.config))
    sizes = propose_sizes(mlp_importances(dense, text.tokens_NT), keep, multiple_of)
    return {
        "intermediate_sizes": list(sizes),
        "kept": sum(sizes) / sum(dense.config.mlp_sizes),
    }
