from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError, ConfigError, ModelNotFoundError
from cluster.storage import staged_directory
from jobs.config import DeployConfig
from jobs.deploy import deploy, merge
from jobs.registry import Registry


class FakeApi:
    """Serve's REST API with scripted states."""

    http_port = 8123

    def __init__(self, states: list[dict[str, Any]]) -> None:
        self.states = states
        self.deployed: list[dict[str, Any]] = []

    def details(self) -> dict[str, Any]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def deploy(self, config: dict[str, Any]) -> None:
        self.deployed.append(config)


def app_state(status: str, message: str = "") -> dict[str, Any]:
    return {"applications": {"raysmith": {"status": status, "message": message}}}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    with staged_directory(source, {"kind": "model"}) as folder:
        (folder / "weights").write_bytes(b"w")
    root = tmp_path / "registry"
    Registry(root).publish(source, "tiny")
    return root


def config(**changes: Any) -> DeployConfig:
    return DeployConfig(model="tiny@1", api_keys_file="/keys", ready_timeout_s=5).replace(**changes)


def test_deploy_when_the_application_comes_up_sends_one_loopback_config(registry: Path):
    api = FakeApi([{}, app_state("DEPLOYING"), app_state("RUNNING")])
    entry = deploy(config(num_replicas=2), str(registry), api)
    assert entry.reference == "tiny@1"
    (sent,) = api.deployed
    assert sent["http_options"] == {"host": "127.0.0.1", "port": 8123}
    (app,) = sent["applications"]
    assert app["import_path"] == "serving.app:build"
    assert app["args"]["num_replicas"] == 2


def test_deploy_when_the_model_is_unknown_changes_nothing(registry: Path):
    api = FakeApi([{}])
    with pytest.raises(ModelNotFoundError):
        deploy(config(model="tiny@7"), str(registry), api)
    assert api.deployed == []


def test_deploy_when_the_application_fails_raises_with_serves_message(registry: Path):
    api = FakeApi([{}, app_state("DEPLOY_FAILED", "the replica found no keys")])
    with pytest.raises(ClusterError, match="the replica found no keys"):
        deploy(config(), str(registry), api)


def test_merge_when_other_applications_run_keeps_them_and_replaces_its_own():
    details = {
        "applications": {
            "other": {"deployed_app_config": {"name": "other", "route_prefix": "/other"}},
            "mine": {"deployed_app_config": {"name": "mine", "args": 1}},
        }
    }
    assert merge(details, {"name": "mine", "route_prefix": "/", "args": 2}) == [
        {"name": "other", "route_prefix": "/other"},
        {"name": "mine", "route_prefix": "/", "args": 2},
    ]


def test_merge_when_another_application_has_the_path_names_both():
    details = {"applications": {"other": {"deployed_app_config": {"name": "other"}}}}
    with pytest.raises(ConfigError, match=r"`other` answers under `/` already.*`mine`"):
        merge(details, {"name": "mine", "route_prefix": "/"})
