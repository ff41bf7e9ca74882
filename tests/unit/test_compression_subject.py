"""The benchmark's model is taken from its folder only if it was trained as it would be now."""

from pathlib import Path

import pytest

from benchmarks.compression.subject import STEPS, Subject, train, training
from cluster.errors import ConfigError
from cluster.storage import digest_file, read_manifest, staged_directory, write_manifest
from jobs.config import TrainConfig
from jobs.models import decoder
from jobs.training.run_folder import identity
from tests.tiny_models import decoder_config

SHAPE = decoder_config(vocab_size=300)
CONFIG = training(0, SHAPE)


def trained(tmp_path: Path, config: TrainConfig = CONFIG) -> tuple[Path, Path]:
    """Write what a finished training leaves; return its data and its folder."""
    data, folder = tmp_path / "data", tmp_path / "seed-0"
    data.mkdir(exist_ok=True)
    folder.mkdir()
    write_manifest(data, {"kind": "data"})
    manifest = {
        "kind": "model",
        "lineage": {
            "config": identity(config),
            "data_sha256": read_manifest(data)["self_sha256"],
        },
        "metrics": {"steps": 800, "tokens": 3_276_800, "validation_loss": 4.0},
    }
    with staged_directory(folder / "model", manifest) as staged:
        decoder.save(decoder.build(SHAPE, 0), staged)
    return data, folder


def test_train_when_a_model_was_trained_so_takes_it(tmp_path: Path) -> None:
    data, folder = trained(tmp_path)
    # How a run is carried out decides no weights.
    config = CONFIG.replace(checkpoint_every_steps=7, name="other")
    assert train(config, data, folder) == folder / "model"


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"max_steps": 1200}, "`max_steps` was 1200 and is now 800"), ({"seed": 5}, "`seed` was 5")],
)
def test_train_when_a_model_was_trained_otherwise_names_the_folder_to_delete(
    tmp_path: Path, changed: dict[str, int], named: str
) -> None:
    data, folder = trained(tmp_path, CONFIG.replace(**changed))
    with pytest.raises(ConfigError) as caught:
        train(CONFIG, data, folder)
    assert named in caught.value.message
    assert f"{folder} holds" in caught.value.message
    assert "Delete that folder" in caught.value.message


def test_train_when_the_data_is_another_refuses_the_model(tmp_path: Path) -> None:
    data, folder = trained(tmp_path)
    write_manifest(data, {"kind": "data", "note": "prepared anew"})
    with pytest.raises(ConfigError, match="data_sha256"):
        train(CONFIG, data, folder)


def test_document_when_asked_says_what_decided_the_weights(tmp_path: Path) -> None:
    data, folder = trained(tmp_path)
    found = Subject(0, folder / "model", data, CONFIG).document()
    assert found["steps"] == 800
    assert found["model_sha256"] == digest_file(folder / "model" / "model.safetensors")
    other = Subject(0, folder / "model", data, CONFIG.replace(max_steps=1200)).document()
    assert found["config_sha256"] != other["config_sha256"]


def test_training_when_it_is_longer_has_a_folder_of_its_own() -> None:
    names = [training(0, SHAPE, steps).name for steps in (STEPS, 2 * STEPS)]
    assert names == ["seed-0", f"seed-0-{2 * STEPS}-steps"]
