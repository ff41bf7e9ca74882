"""The result of a run as a model directory that transformers, vLLM and the registry read.

Takes a trained model and where it came from; gives `model/`, published whole or not at all.
"""

from pathlib import Path
from typing import Any

import jobs.models
from cluster.config import StrictModel
from cluster.storage import read_manifest, staged_directory, verify_directory
from jobs.config import TrainConfig
from jobs.data.prepare import TOKENIZER_FOLDER
from jobs.data.tokenizer import copy_tokenizer
from jobs.plugins import load_plugin
from jobs.training.outcome import TrainOutcome
from jobs.training.run_folder import identity

MODEL_KIND = "model"


class Lineage(StrictModel):
    """Where a trained model comes from."""

    run: str
    data_sha256: str
    config: dict[str, Any]


def export_model(model: Any, config: TrainConfig, data_dir: Path, outcome: TrainOutcome) -> None:
    """Write weights in bf16, tokenizer and manifest; a whole directory from before is kept.

    Raises IntegrityError if a directory from before is damaged.
    """
    if outcome.model_dir.exists():
        verify_directory(outcome.model_dir)
        return
    family = load_plugin(jobs.models, config.model.family, what="model family")
    lineage = Lineage(
        run=config.name,
        data_sha256=read_manifest(data_dir)["self_sha256"],
        config=identity(config),
    )
    manifest = {
        "kind": MODEL_KIND,
        "recipe": None,
        "lineage": lineage.model_dump(mode="json"),
        "metrics": outcome.model_dump(
            mode="json", include={"steps", "train_loss", "validation_loss", "tokens"}
        ),
    }
    with staged_directory(outcome.model_dir, manifest) as folder:
        family.save(model, folder)
        copy_tokenizer(data_dir / TOKENIZER_FOLDER, folder)
