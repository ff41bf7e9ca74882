from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError, ModelNotFoundError
from cluster.storage import staged_directory
from jobs.config import DeployConfig, ReplicaScaling
from jobs.deploy import deploy, routes_of
from jobs.registry import Registry


class FakeApi:
    """Serve's REST API: what is deployed runs at once, unless it is named in `failing`."""

    http_port = 8123

    def __init__(self) -> None:
        self.deployed: list[dict[str, dict[str, Any]]] = []
        self.configs: list[dict[str, Any]] = []
        self.failing: dict[str, str] = {}

    def details(self) -> dict[str, Any]:
        apps = self.deployed[-1] if self.deployed else {}
        return {
            "applications": {
                name: {
                    "status": "DEPLOY_FAILED" if name in self.failing else "RUNNING",
                    "message": self.failing.get(name, ""),
                    "deployed_app_config": app,
                }
                for name, app in apps.items()
            }
        }

    def deploy(self, config: dict[str, Any]) -> None:
        self.configs.append(config)
        self.deployed.append({app["name"]: app for app in config["applications"]})

    @property
    def steps(self) -> list[tuple[set[str], list[str]]]:
        """The applications and the versions with requests after each call."""
        return [
            (set(apps), [f"{r['name']}@{r['version']}" for r in routes_of(apps, "gateway")])
            for apps in self.deployed
        ]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    with staged_directory(source, {"kind": "model"}) as folder:
        (folder / "weights").write_bytes(b"w")
    root = tmp_path / "registry"
    for name in ("tiny", "tiny", "other"):
        Registry(root).publish(source, name)
    return root


def config(**changes: Any) -> DeployConfig:
    values = {"model": "tiny@1", "ledger": "/ledger.db", "ready_timeout_s": 5}
    return DeployConfig(**{**values, **changes})


def test_deploy_when_nothing_runs_starts_engine_and_gateway_at_once(registry: Path):
    api = FakeApi()
    entry = deploy(config(num_replicas=2), str(registry), api)
    assert entry.reference == "tiny@1"
    assert api.steps == [({"engine--tiny--1", "gateway"}, ["tiny@1"])]
    apps = api.deployed[0]
    assert apps["engine--tiny--1"]["args"]["num_replicas"] == 2
    assert apps["gateway"]["args"]["port"] == 8123
    assert apps["gateway"]["args"]["ledger"].endswith("/ledger.db")
    assert api.configs[0]["proxy_location"] == "Disabled"


def test_deploy_when_another_version_runs_moves_requests_once_the_new_one_is_up(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    deploy(config(model="tiny@2"), str(registry), api)
    assert api.steps[1:] == [
        ({"engine--tiny--1", "engine--tiny--2", "gateway"}, ["tiny@1"]),
        ({"engine--tiny--1", "engine--tiny--2", "gateway"}, ["tiny@2"]),
        ({"engine--tiny--2", "gateway"}, ["tiny@2"]),
    ]


def test_deploy_when_another_model_runs_leaves_its_application_as_it_was(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    deploy(config(model="other@1"), str(registry), api)
    assert api.steps[1:] == [
        ({"engine--tiny--1", "engine--other--1", "gateway"}, ["tiny@1", "other@1"])
    ]
    assert api.deployed[0]["engine--tiny--1"] == api.deployed[1]["engine--tiny--1"]
    assert api.deployed[0]["gateway"]["args"] == api.deployed[1]["gateway"]["args"]


def test_deploy_when_the_gateway_has_bounds_of_its_own_keeps_them(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    api.deployed[-1]["gateway"]["args"]["max_accepted_choices"] = 7
    deploy(config(model="other@1", ledger=None), str(registry), api)
    args = api.deployed[-1]["gateway"]["args"]
    assert (args["max_accepted_choices"], args["port"]) == (7, 8123)


def test_deploy_when_the_new_version_fails_leaves_the_old_one_and_says_why(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    api.failing["engine--tiny--2"] = "the weights are damaged"
    with pytest.raises(ClusterError, match="the weights are damaged"):
        deploy(config(model="tiny@2"), str(registry), api)
    assert api.deployed[-1] == api.deployed[0]


def test_deploy_when_replicas_scale_says_so_to_engine_and_gateway(registry: Path):
    api = FakeApi()
    scaling = ReplicaScaling(min_replicas=0, max_replicas=3)
    deploy(config(scaling=scaling), str(registry), api)
    apps = api.deployed[-1]
    assert apps["engine--tiny--1"]["args"]["scaling"] == scaling.model_dump()
    (route,) = routes_of(apps, "gateway")
    assert route["scales_to_zero"]


def test_deploy_when_the_model_is_unknown_changes_nothing(registry: Path):
    api = FakeApi()
    with pytest.raises(ModelNotFoundError):
        deploy(config(model="tiny@7"), str(registry), api)
    assert api.deployed == []
