"""What a rollout on a cluster is refused before anything is changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.accounting import ROLLOUT_TEAM
from cluster.errors import ClusterError, ConfigError, ModelNotFoundError
from cluster.ledger import Ledger
from cluster.storage import staged_directory
from jobs.applications import App, engine_app, gateway_app, route_to, routes_of, with_routes
from jobs.config import DeployConfig
from jobs.registry import Registry
from serving.canary import prepare
from serving.directory import LocalDirectory
from serving.rollout import Observation, PromoteConfig, RolloutLimits, RolloutState


class FakeApi:
    """Serve's REST API with applications that run."""

    http_port = 8123

    def __init__(self, apps: dict[str, App]) -> None:
        self.apps = apps
        self.may_change = False

    def details(self) -> dict[str, Any]:
        states = {
            name: {"status": "RUNNING", "deployed_app_config": app}
            for name, app in self.apps.items()
        }
        return {"applications": states}

    def deploy(self, config: dict[str, Any]) -> None:
        assert self.may_change, "nothing shall be changed"
        self.apps = {app["name"]: app for app in config["applications"]}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    for length in (1024, 2048):
        source = tmp_path / f"source{length}"
        with staged_directory(source, {"kind": "model"}) as folder:
            (folder / "config.json").write_text(json.dumps({"max_position_embeddings": length}))
        registry.publish(source, "tiny")
    return registry


def serving(registry: Registry, **route: Any) -> FakeApi:
    """Return an API of a cluster where tiny@1 answers."""
    entry = registry.resolve("tiny@1")
    config = DeployConfig(model="tiny@1", ledger=str(registry.root.parent / "ledger.db"))
    engine = engine_app(config, registry.root, entry)
    apps = {engine["name"]: engine, "gateway": gateway_app(config, {}, 8123, [])}
    return FakeApi(with_routes(apps, "gateway", [route_to(entry, config, **route)]))


def config(registry: Registry, **changes: Any) -> PromoteConfig:
    return PromoteConfig(**{"model": "tiny@2", "registry": str(registry.root), **changes})


def test_prepare_when_another_version_answers_has_a_key_that_ends_with_it(registry: Registry):
    api = serving(registry)
    with Ledger.open(str(registry.root.parent / "ledger.db")) as ledger:
        with prepare(config(registry), api):
            (key,) = ledger.snapshot().keys.values()
            assert key.team == ROLLOUT_TEAM
            assert key.expires_s is not None
        (key,) = ledger.snapshot().keys.values()
        assert key.revoked_s is not None


def test_start_when_the_version_reads_more_tokens_its_route_says_so(registry: Registry):
    api = serving(registry)
    with prepare(config(registry), api) as canary:
        api.may_change = True
        canary.start()
    old, new = routes_of(api.apps, "gateway")
    assert (old["version"], old["context_tokens"]) == ("1", 1024)
    assert (new["version"], new["context_tokens"], new["weight"]) == ("2", 2048, 0.0)


def test_finish_when_rolled_back_stops_the_new_version_and_no_later_one(registry: Registry):
    api = serving(registry)
    with prepare(config(registry), api) as canary:
        api.may_change = True
        canary._directory = LocalDirectory()
        canary.start()
        api.apps["engine--tiny--3"] = {
            **api.apps["engine--tiny--2"],
            "name": "engine--tiny--3",
        }
        canary.finish(RolloutState.ROLLED_BACK)
    assert set(api.apps) == {"engine--tiny--1", "engine--tiny--3", "gateway"}
    assert [route["version"] for route in routes_of(api.apps, "gateway")] == ["1"]


def side_by_side(registry: Registry, **added: Any) -> FakeApi:
    """Return an API of a cluster where tiny@1 and tiny@0 share the requests."""
    api = serving(registry, weight=0.75)
    (line,) = routes_of(api.apps, "gateway")
    engine = {**api.apps["engine--tiny--1"], "name": "engine--tiny--0"}
    sibling = {**line, "version": "0", "application": engine["name"], "weight": 0.25}
    lines = [line, sibling, *([{**line, **added}] if added else [])]
    api.apps = with_routes({**api.apps, engine["name"]: engine}, "gateway", lines)
    api.may_change = True
    return api


def weights(api: FakeApi) -> dict[str, float]:
    return {line["version"]: line["weight"] for line in routes_of(api.apps, "gateway")}


def test_canary_when_a_sibling_shares_the_requests_keeps_its_part_and_gets_it_back(
    registry: Registry,
):
    api = side_by_side(registry)
    with prepare(config(registry), api) as canary:
        canary._directory = LocalDirectory()
        canary.start()
        assert weights(api) == {"1": 0.75, "0": 0.25, "2": 0.0}
        canary.give_share(0.2)
        assert weights(api) == pytest.approx({"1": 0.6, "0": 0.2, "2": 0.2})
        canary.finish(RolloutState.ROLLED_BACK)
    assert weights(api) == {"1": 0.75, "0": 0.25}
    assert set(api.apps) == {"engine--tiny--0", "engine--tiny--1", "gateway"}


def test_finish_when_promoted_stops_siblings_and_keeps_what_came_since(registry: Registry):
    api = side_by_side(registry)
    with prepare(config(registry), api) as canary:
        canary._directory = LocalDirectory()
        canary.start()
        lines = routes_of(api.apps, "gateway")
        later = {**lines[0], "version": "3", "application": "engine--tiny--3", "weight": 0.0}
        api.apps = with_routes(api.apps, "gateway", [*lines, later])
        canary.finish(RolloutState.PROMOTED)
    assert weights(api) == {"2": 1.0, "3": 0.0}
    assert set(api.apps) == {"engine--tiny--2", "gateway"}


def test_finish_when_the_version_was_offered_before_leaves_it_as_it_was(registry: Registry):
    api = side_by_side(registry, version="2", application="engine--tiny--2", weight=0.0)
    pinned = {**api.apps["engine--tiny--1"], "name": "engine--tiny--2", "route_prefix": "/pinned"}
    api.apps["engine--tiny--2"] = pinned
    with prepare(config(registry), api) as canary:
        canary._directory = LocalDirectory()
        canary.start()
        canary.finish(RolloutState.ROLLED_BACK)
    assert weights(api) == {"1": 0.75, "0": 0.25, "2": 0.0}
    assert api.apps["engine--tiny--2"] == pinned


@pytest.mark.parametrize("min_parity", [0.0, 0.9])
def test_observe_when_there_is_nothing_to_compare_with_asks_nothing(
    registry: Registry, min_parity: float
):
    limits = RolloutLimits(min_parity=min_parity)  # The model has no tokenizer.
    with prepare(config(registry, limits=limits), serving(registry)) as canary:
        assert canary.observe(RolloutState.CHECKING) == Observation(is_compared=False)


@pytest.mark.parametrize("state", [RolloutState.PROMOTED, RolloutState.ROLLED_BACK])
def test_finish_when_what_shall_answer_was_stopped_leaves_the_routes(
    registry: Registry, state: RolloutState
):
    api = serving(registry)
    with prepare(config(registry), api) as canary:
        del api.apps["engine--tiny--1"]
        with pytest.raises(ClusterError, match="no longer runs"):
            canary.finish(state)
    assert routes_of(api.apps, "gateway")[0]["version"] == "1"


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ({"version": "2"}, "nothing to compare tiny@2 with"),
        ({"lease": "of a rollout that died"}, "nothing to compare tiny@2 with"),
        ({"weight": 0.0}, "nothing to compare tiny@2 with"),
        ({"task": "embed"}, "`tiny` embeds"),
        ({"application": "mine"}, "`mine`, which does not run"),
    ],
)
def test_prepare_when_nothing_can_be_compared_says_what_to_do(
    registry: Registry, route: dict[str, Any], words: str
):
    with (
        pytest.raises(ConfigError, match=words),
        prepare(config(registry), serving(registry, **route)),
    ):
        pass


def test_prepare_when_the_version_is_unknown_lists_those_there_are(registry: Registry):
    with (
        pytest.raises(ModelNotFoundError, match="1, 2"),
        prepare(config(registry, model="tiny@3"), serving(registry)),
    ):
        pass


@pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("\n\n", "no prompt")])
def test_prepare_when_prompts_are_missing_says_so(
    registry: Registry, tmp_path: Path, text: str | None, words: str
):
    path = tmp_path / "prompts"
    if text is not None:
        path.write_text(text)
    with (
        pytest.raises(ConfigError, match=words),
        prepare(config(registry, prompts=str(path)), serving(registry)),
    ):
        pass
