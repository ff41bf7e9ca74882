"""A model directory as one file for another program: GGUF, for llama.cpp.

Takes a directory or a published model, a format and a path; gives the file, or nothing on any
failure. It does not know how a format lays out weights.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from cluster.errors import ConfigError, VersionExistsError
from cluster.storage import resolve_output, staged_file
from jobs.compression.gguf_export import DenseType, export_gguf
from jobs.registry import find_model


class ExportFormat(StrEnum):
    """What matrices that are not quantized become; quantized ones keep their integers."""

    GGUF_BF16 = "gguf-bf16"
    GGUF_Q8_0 = "gguf-q8_0"
    GGUF_Q4_0 = "gguf-q4_0"


_DENSE: dict[ExportFormat, DenseType] = {
    ExportFormat.GGUF_BF16: "BF16",
    ExportFormat.GGUF_Q8_0: "Q8_0",
    ExportFormat.GGUF_Q4_0: "Q4_0",
}
_SUFFIX = ".gguf"


def export_model(
    model: str,
    kind: ExportFormat,
    output: str,
    *,
    registry: str = "runs/registry",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write the file and return its path, bytes and how many tensors are of which type.

    `progress` hears of tensors done, of how many. Raises VersionExistsError if the output exists,
    ConfigError for a name without the format's ending, ModelNotFoundError or ModelFormatError for a
    model that is not there or that the format cannot express.
    """
    source, target = resolve_output(model), resolve_output(output)
    if target.suffix != _SUFFIX:
        raise ConfigError(
            f"`--output` = {output} does not end in {_SUFFIX}, by which other programs know "
            f"the format {kind}. Rename it."
        )
    if target.exists():
        raise VersionExistsError(
            f"`--output` = {target} exists and is never overwritten. Choose another name."
        )
    if not source.is_dir():
        source = find_model(model, resolve_output(registry))
    with staged_file(target) as staging:
        kinds = export_gguf(source, staging, dense=_DENSE[kind], progress=progress)
    counts = {each: list(kinds.values()).count(each) for each in sorted(set(kinds.values()))}
    return {
        "model": str(source),
        "file": str(target),
        "size_bytes": target.stat().st_size,
        "tensors": counts,
    }
