"""What a rollout on a cluster is refused before anything is changed."""

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError, ModelNotFoundError
from cluster.ledger import Ledger
from cluster.storage import staged_directory
from jobs.config import DeployConfig
from jobs.deploy import App, engine_app, gateway_app, route_to, with_routes
from jobs.registry import Registry
from serving.canary import ROLLOUT_TEAM, prepare
from serving.rollout import PromoteConfig


class FakeApi:
    """Serve's REST API with applications that run."""

    http_port = 8123

    def __init__(self, apps: dict[str, App]) -> None:
        self.apps = apps

    def details(self) -> dict[str, Any]:
        states = {name: {"deployed_app_config": app} for name, app in self.apps.items()}
        return {"applications": states}

    def deploy(self, config: dict[str, Any]) -> None:
        raise AssertionError("nothing shall be changed")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    source = tmp_path / "source"
    with staged_directory(source, {"kind": "model"}) as folder:
        (folder / "weights").write_bytes(b"w")
    registry = Registry(tmp_path / "registry")
    for _ in range(2):
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


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ({"version": "2"}, "nothing to compare tiny@2 with"),
        ({"lease": "of a rollout that died"}, "nothing to compare tiny@2 with"),
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
