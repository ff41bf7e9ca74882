"""What `serve deploy` is refused before anything starts; nothing here starts a cluster."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray import serve

from cluster.errors import ConfigError, ModelNotFoundError
from cluster.storage import staged_directory
from jobs.registry import Registry
from serving.app import ServeArgs, build
from serving.gateway.auth import make_key

RECIPE = Path(__file__).resolve().parents[2] / "deploy" / "recipes" / "serve.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    with staged_directory(source, {"kind": "model"}) as staged:
        (staged / "weights").write_bytes(b"w")
    registry = Registry(tmp_path / "registry")
    registry.publish(source, "tiny")
    registry.promote("tiny", "1")
    make_key(tmp_path / "api-keys", "alice")
    return tmp_path


def arguments(folder: Path, **changes: Any) -> ServeArgs:
    """Return the arguments of the recipe, with this test's folders."""
    args = yaml.safe_load(RECIPE.read_text())["applications"][0]["args"]
    paths = {"registry": str(folder / "registry"), "api_keys_file": str(folder / "api-keys")}
    return ServeArgs(**{**args, **paths, **changes})


def test_build_when_model_and_keys_exist_gives_an_application(folder: Path):
    assert isinstance(build(arguments(folder)), serve.Application)


def test_build_when_model_is_unknown_is_refused(folder: Path):
    with pytest.raises(ModelNotFoundError, match="large"):
        build(arguments(folder, models=("large@production",)))


def test_build_when_key_file_is_missing_is_refused(folder: Path):
    with pytest.raises(ConfigError, match="raysmith keys new"):
        build(arguments(folder, api_keys_file=str(folder / "no-keys")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ()}, "models"),
        ({"models": ("tiny@1", "tiny@production")}, "two versions of `tiny`"),
        ({"num_replica": 2}, "num_replica"),
        ({"max_accepted_choices": 0}, "max_accepted_choices"),
    ],
)
def test_arguments_when_wrong_are_refused(folder: Path, changes: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        arguments(folder, **changes)
