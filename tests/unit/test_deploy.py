import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import (
    ClusterError,
    GateRefusedError,
    ModelFormatError,
    ModelNotFoundError,
)
from cluster.storage import staged_directory
from jobs.applications import route_to, routes_of, with_routes
from jobs.config import DeployConfig, ReplicaScaling
from jobs.deploy import deploy
from jobs.models._bert import EncoderConfig, to_hf_config, write_encoder_config
from jobs.registry import Entry, Registry


class FakeApi:
    """Serve's REST API: what is deployed runs at once, unless it is named in `failing`.

    After each call the next of `meanwhile` happens, as by another process.
    """

    http_port = 8123

    def __init__(self) -> None:
        self.deployed: list[dict[str, dict[str, Any]]] = []
        self.configs: list[dict[str, Any]] = []
        self.failing: dict[str, str] = {}
        self.meanwhile: list[Callable[[], object]] = []

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
        if self.meanwhile:
            self.meanwhile.pop(0)()

    @property
    def steps(self) -> list[tuple[set[str], list[str]]]:
        """The applications and the versions with requests after each call."""
        return [
            (
                set(apps),
                [f"{r['name']}@{r['version']}" for r in routes_of(apps, "gateway") if r["weight"]],
            )
            for apps in self.deployed
        ]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    with staged_directory(source, {"kind": "model"}) as folder:
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    root = tmp_path / "registry"
    for name in ("tiny", "tiny", "other"):
        Registry(root).publish(source, name)
    return root


def publish_encoder(registry: Path) -> None:
    source = registry.parent / "encoder"
    shape = EncoderConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, max_seq_len=128
    )
    with staged_directory(source, {"kind": "model"}) as folder:
        write_encoder_config(shape, to_hf_config(shape), folder)
    Registry(registry).publish(source, "encoder")


def config(**changes: Any) -> DeployConfig:
    values = {"model": "tiny@1", "ledger": "/ledger.db", "ready_timeout_s": 5, "min_parity": 0}
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


class Checked:
    """A check of a version that takes over; it notes what runs then."""

    def __init__(self, api: FakeApi, error: BaseException | None = None) -> None:
        self.api, self.error = api, error
        self.seen: list[tuple[str, float, dict[str, float]]] = []

    def __call__(
        self,
        entry: Entry,
        gateway: Mapping[str, Any],
        route: Mapping[str, Any],
        min_parity: float,
    ) -> None:
        assert gateway["port"] == FakeApi.http_port
        assert route["context_tokens"] == 2048
        routes = routes_of(self.api.deployed[-1], "gateway")
        weights = {route["version"]: route["weight"] for route in routes}
        self.seen.append((entry.reference, min_parity, weights))
        if self.error is not None:
            raise self.error


def test_deploy_when_it_takes_over_is_checked_first_by_its_own_name(registry: Path):
    api = FakeApi()
    check = Checked(api)
    for reference in ("tiny@1", "other@1", "tiny@2", "tiny@2"):
        deploy(config(model=reference, min_parity=0.5), str(registry), api, check)
    (seen,) = check.seen  # Neither a first version nor the same one again takes over.
    assert (seen[0], seen[1]) == ("tiny@2", 0.5)
    assert api.steps[-1] == (
        {"engine--tiny--2", "engine--other--1", "gateway"},
        ["other@1", "tiny@2"],
    )


@pytest.mark.parametrize("error", [GateRefusedError("3 of 16"), KeyboardInterrupt()])
def test_deploy_when_the_check_fails_leaves_the_old_version(registry: Path, error: BaseException):
    api = FakeApi()
    check = Checked(api, error)
    deploy(config(min_parity=0.5), str(registry), api, check)
    with pytest.raises(type(error)):
        deploy(config(model="tiny@2", min_parity=0.5), str(registry), api, check)
    assert check.seen == [("tiny@2", 0.5, {"1": 1.0, "2": 0.0})]
    assert api.deployed[-1] == api.deployed[0]


def test_deploy_when_its_route_was_left_without_requests_is_checked(registry: Path):
    api = FakeApi()
    check = Checked(api)
    deploy(config(min_parity=0.5), str(registry), api, check)
    (left,) = routes_of(api.deployed[-1], "gateway")
    routes = [left, {**left, "version": "2", "weight": 0.0}]
    api.deployed.append(with_routes(api.deployed[-1], "gateway", routes))
    deploy(config(model="tiny@2", min_parity=0.5), str(registry), api, check)
    assert check.seen == [("tiny@2", 0.5, {"1": 1.0, "2": 0.0})]
    assert api.steps[-1] == ({"engine--tiny--2", "gateway"}, ["tiny@2"])


def test_deploy_when_another_version_is_still_checked_leaves_it_its_route(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    (route,) = routes_of(api.deployed[-1], "gateway")
    late = {**route, "version": "3", "weight": 0.0}

    def start_another() -> None:
        routes = [*routes_of(api.deployed[-1], "gateway"), late]
        api.deployed.append(with_routes(api.deployed[-1], "gateway", routes))

    api.meanwhile = [start_another]
    deploy(config(model="tiny@2"), str(registry), api)
    assert late in routes_of(api.deployed[-1], "gateway")
    assert api.steps[-1][1] == ["tiny@2"]


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


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        ({}, {"tiny@2", "other@1"}),
        ({"engine--tiny--2": "out of memory"}, {"tiny@1", "other@1"}),
    ],
)
def test_deploy_when_another_model_is_deployed_meanwhile_keeps_it(
    registry: Path, failing: dict[str, str], expected: set[str]
):
    api = FakeApi()
    deploy(config(), str(registry), api)
    api.failing = failing
    api.meanwhile = [lambda: deploy(config(model="other@1"), str(registry), api)]
    if failing:
        with pytest.raises(ClusterError, match="out of memory"):
            deploy(config(model="tiny@2"), str(registry), api)
    else:
        deploy(config(model="tiny@2"), str(registry), api)
    applications, routes = api.steps[-1]
    assert applications == {f"engine--{r.replace('@', '--')}" for r in expected} | {"gateway"}
    assert set(routes) == expected


@pytest.mark.parametrize(
    ("others", "left"),
    [([], (set(), [])), (["other@1"], ({"engine--other--1", "gateway"}, ["other@1"]))],
)
def test_deploy_when_the_first_one_fails_leaves_a_gateway_only_to_others(
    registry: Path, others: list[str], left: tuple[set[str], list[str]]
):
    api = FakeApi()
    api.failing["engine--tiny--1"] = "out of memory"
    api.meanwhile = [lambda r=r: deploy(config(model=r), str(registry), api) for r in others]
    with pytest.raises(ClusterError, match="out of memory"):
        deploy(config(), str(registry), api)
    assert api.steps[-1] == left


def test_deploy_when_it_fails_gives_the_gateway_its_port_back(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    api.failing["engine--tiny--2"] = "out of memory"
    with pytest.raises(ClusterError, match="out of memory"):
        deploy(config(model="tiny@2", port=9000), str(registry), api)
    assert api.deployed[1]["gateway"]["args"]["port"] == 9000
    assert api.deployed[-1] == api.deployed[0]


def test_deploy_when_a_rollout_starts_another_version_meanwhile_keeps_it(registry: Path):
    api = FakeApi()
    canary = {"name": "engine--tiny--2", "import_path": "serving.app:build_engine"}
    canary["args"] = {"model": "tiny@2"}
    api.meanwhile = [lambda: api.deployed.append({**api.deployed[-1], canary["name"]: canary})]
    deploy(config(), str(registry), api)
    assert api.steps[-1] == ({"engine--tiny--1", "engine--tiny--2", "gateway"}, ["tiny@1"])


def test_deploy_when_the_gateway_is_stopped_meanwhile_says_so(registry: Path):
    api = FakeApi()
    deploy(config(), str(registry), api)
    without = {"engine--tiny--2": {"name": "engine--tiny--2"}}
    api.meanwhile = [lambda: api.deployed.append(without)]
    with pytest.raises(ClusterError, match="`gateway`"):
        deploy(config(model="tiny@2", ready_timeout_s=0.01), str(registry), api)
    assert api.deployed[-1] == {}


@pytest.mark.parametrize(
    ("model", "options", "task", "context_tokens"),
    [
        ("tiny@1", {}, "generate", 2048),
        ("tiny@1", {"max_len": 512}, "generate", 512),
        ("encoder@1", {"max_len": 512}, "embed", 128),
    ],
)
def test_route_to_when_no_replica_says_it_tells_what_the_model_is_for(
    registry: Path, model: str, options: dict[str, Any], task: str, context_tokens: int
):
    publish_encoder(registry)
    entry = Registry(registry).resolve(model)
    route = route_to(entry, config(model=model, engine_options=options))
    assert (route["task"], route["context_tokens"]) == (task, context_tokens)


def test_deploy_when_the_directory_is_no_model_changes_nothing(registry: Path):
    source = registry.parent / "empty"
    with staged_directory(source, {"kind": "model"}) as folder:
        (folder / "weights").write_bytes(b"w")
    Registry(registry).publish(source, "empty")
    api = FakeApi()
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        deploy(config(model="empty@1"), str(registry), api)
    assert api.deployed == []
