"""A verdict written into the manifest of the model that it is about.

Takes a model directory, its manifest as it was checked, and a verdict; writes the manifest again.
It does not know how the verdict came about, nor who reads it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.storage import write_manifest
from jobs.evaluation.gate import Verdict


def record_verdict(directory: Path, manifest: Mapping[str, Any], verdict: Verdict) -> None:
    """Write a verdict as `gate`, and its numbers beside the other `metrics`."""
    kept = {key: value for key, value in manifest.items() if key not in ("files", "self_sha256")}
    metrics = {**kept.get("metrics", {}), **verdict.numbers}
    gate = verdict.model_dump(mode="json")
    write_manifest(directory, {**kept, "gate": gate, "metrics": metrics})
