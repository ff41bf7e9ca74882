"""What `serve deploy` is refused before anything starts; nothing here starts a cluster."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray import serve

from cluster.config import parse_config
from cluster.errors import ConfigError, LedgerError, ModelNotFoundError
from cluster.storage import staged_directory
from jobs.registry import Registry
from serving.app import EngineArgs, ServeArgs, build, build_engine
from serving.routing import RoutingTable

RECIPE = Path(__file__).resolve().parents[2] / "deploy" / "recipes" / "serve.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    with staged_directory(source, {"kind": "model"}) as staged:
        (staged / "weights").write_bytes(b"w")
    registry = Registry(tmp_path / "registry")
    registry.publish(source, "stdlib-tiny")
    return tmp_path


def recipe(number: int) -> dict[str, Any]:
    """Return one application of the recipe."""
    return yaml.safe_load(RECIPE.read_text())["applications"][number]


def engine_args(folder: Path, **changes: Any) -> EngineArgs:
    registry = {"registry": str(folder / "registry")}
    return EngineArgs(**{**recipe(0)["args"], **registry, **changes})


def gateway_args(folder: Path, **changes: Any) -> ServeArgs:
    ledger = {"ledger": str(folder / "ledger.db")}
    return ServeArgs(**{**recipe(1)["args"], **ledger, **changes})


def test_build_engine_when_the_model_exists_gives_an_application(folder: Path):
    assert isinstance(build_engine(engine_args(folder)), serve.Application)


def test_build_engine_when_it_scales_gives_an_application(folder: Path):
    scaling = {"min_replicas": 0, "max_replicas": 3}
    assert isinstance(build_engine(engine_args(folder, scaling=scaling)), serve.Application)


def test_build_engine_when_the_model_is_unknown_is_refused(folder: Path):
    with pytest.raises(ModelNotFoundError, match="large"):
        build_engine(engine_args(folder, model="large@production"))


def test_build_engine_when_the_directory_does_not_exist_is_refused(folder: Path):
    with pytest.raises(ConfigError, match=r"`directory` = .*nowhere: there is no directory"):
        build_engine(engine_args(folder, directory=str(folder / "nowhere")))
    found = build_engine(engine_args(folder, directory=str(folder / "source")))
    assert isinstance(found, serve.Application)


def test_build_when_the_ledger_can_be_opened_gives_an_application(folder: Path):
    assert isinstance(build(gateway_args(folder)), serve.Application)


def test_build_when_the_ledger_cannot_be_opened_is_refused(folder: Path):
    (folder / "ledger.db").write_bytes(b"no database" * 100)
    with pytest.raises(LedgerError):
        build(gateway_args(folder))


def test_recipe_when_read_routes_to_the_engine_that_it_deploys():
    (deployment,) = recipe(1)["deployments"]
    table = parse_config(RoutingTable, deployment["user_config"], "the recipe")
    assert [route.reference for route in table.routes] == [recipe(0)["args"]["model"]]
    assert recipe(0)["name"] == "engine--stdlib-tiny--1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_replica": 2}, "num_replica"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"scaling": {"min_replicas": 2, "max_replicas": 1}}, "exceeds `max_replicas`"),
    ],
)
def test_engine_arguments_when_wrong_are_refused(folder: Path, changes: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        engine_args(folder, **changes)


def test_gateway_arguments_when_wrong_are_refused(folder: Path):
    with pytest.raises(ValidationError, match="max_accepted_choices"):
        gateway_args(folder, max_accepted_choices=0)
