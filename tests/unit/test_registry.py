import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import (
    ConfigError,
    GateRefusedError,
    IntegrityError,
    ModelFormatError,
    ModelNotFoundError,
    VersionExistsError,
)
from cluster.storage import read_manifest, staged_directory
from jobs.config import PublishConfig
from jobs.publish import main, publish
from jobs.registry import Registry, find_model

PASSED = {"passed": True, "reasons": [], "numbers": {"size_ratio": 0.4}}
REFUSED = {"passed": False, "reasons": ["too large"], "numbers": {}}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _make_model(tmp_path / "model")


def _make_model(path: Path, **manifest: object) -> Path:
    values = {"kind": "model", "gate": PASSED, "lineage": {"run": "r1"}, **manifest}
    with staged_directory(path, values) as staging:
        (staging / "config.json").write_text("{}")
        (staging / "model.safetensors").write_bytes(bytes(range(200)))
    return path


def test_publish_when_no_version_is_given_takes_the_next_number(
    registry: Registry, source: Path
) -> None:
    assert registry.publish(source, "m").reference == "m@1"
    assert registry.publish(source, "m", "9").version == "9"
    assert registry.publish(source, "m", "rc").version == "rc"
    assert registry.publish(source, "m").version == "10"
    assert [entry.version for entry in registry.entries()] == ["rc", "1", "9", "10"]


def test_publish_when_done_keeps_lineage_gate_and_every_byte(
    registry: Registry, source: Path
) -> None:
    entry = registry.publish(source, "m", metrics={"loss": 1.5}, lineage={"data": "d1"})
    source_digest = read_manifest(source)["self_sha256"]
    assert entry.lineage == {"run": "r1", "data": "d1", "source_digest": source_digest}
    assert entry.metrics == {"loss": 1.5}
    assert read_manifest(entry.path)["gate"] == PASSED
    assert (entry.path / "model.safetensors").read_bytes() == bytes(range(200))
    assert entry.size_bytes == 202


def test_publish_when_the_version_exists_is_refused_and_changes_nothing(
    registry: Registry, source: Path
) -> None:
    first = registry.publish(source, "m", "1")
    with pytest.raises(VersionExistsError, match="m@1"):
        registry.publish(source, "m", "1")
    assert registry.resolve("m@1") == first


@pytest.mark.parametrize(
    ("name", "version"),
    [("../m", "1"), ("", "1"), ("m", "../1"), ("m", "production"), ("m", "latest"), ("m", "a@b")],
)
def test_publish_when_a_name_is_not_safe_is_refused(
    registry: Registry, source: Path, name: str, version: str
) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        registry.publish(source, name, version)
    assert registry.entries() == []


def test_publish_when_the_source_is_damaged_leaves_nothing(
    registry: Registry, source: Path
) -> None:
    (source / "model.safetensors").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        registry.publish(source, "m")
    assert registry.entries() == []


def test_publish_when_the_source_has_no_manifest_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(ModelFormatError, match="manifest"):
        registry.publish(tmp_path / "raw", "m")


def test_publish_when_many_do_it_at_once_gives_each_its_own_version(
    registry: Registry, source: Path
) -> None:
    with ThreadPoolExecutor(6) as pool:
        entries = list(pool.map(lambda _: registry.publish(source, "m"), range(12)))
    assert sorted(int(entry.version) for entry in entries) == list(range(1, 13))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_resolve_when_one_byte_is_damaged_is_refused(
    registry: Registry, source: Path, name: str
) -> None:
    path = registry.publish(source, "m").path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=name):
        registry.resolve("m@1")


def test_resolve_when_a_directory_was_put_in_by_hand_says_so(
    registry: Registry, source: Path
) -> None:
    entry = registry.publish(source, "m")
    entry.path.rename(entry.path.with_name("7"))
    with pytest.raises(IntegrityError, match="m@1"):
        registry.resolve("m@7")


def test_resolve_when_nothing_is_published_says_the_registry_is_empty(registry: Registry) -> None:
    with pytest.raises(ModelNotFoundError, match="It is empty"):
        registry.resolve("m")


def test_resolve_when_unknown_lists_what_exists(registry: Registry, source: Path) -> None:
    registry.publish(source, "small")
    with pytest.raises(ModelNotFoundError, match="It has: small"):
        registry.resolve("smal")
    with pytest.raises(ModelNotFoundError, match="`small` has: 1"):
        registry.resolve("small@2")
    with pytest.raises(ModelNotFoundError, match="promoted to production"):
        registry.resolve("small")


@pytest.mark.parametrize("reference", ["", "@1", "m@", "a/b", "../m@1", "m@../1"])
def test_resolve_when_the_reference_is_malformed_is_a_user_error(
    registry: Registry, source: Path, reference: str
) -> None:
    registry.publish(source, "m")
    with pytest.raises(ConfigError):
        registry.resolve(reference)


def test_promote_when_done_moves_production(registry: Registry, source: Path) -> None:
    registry.publish(source, "m")
    registry.publish(source, "m")
    assert registry.promote("m", "1").aliases == ("production",)
    assert registry.resolve("m").version == "1"
    registry.promote("m", "2")
    assert registry.resolve("m@production").version == "2"
    assert registry.resolve("m@latest").version == "2"
    assert registry.resolve("m@1").aliases == ()


def test_roll_back_when_repeated_walks_back_and_then_is_refused(
    registry: Registry, source: Path
) -> None:
    for version in ("1", "2", "3"):
        registry.publish(source, "m", version)
        registry.promote("m", version)
    assert registry.roll_back("m").version == "2"
    assert registry.roll_back("m").version == "1"
    with pytest.raises(ModelNotFoundError, match="no earlier version"):
        registry.roll_back("m")
    assert registry.resolve("m").version == "1"
    actions = [event["action"] for event in registry.history("m")]
    assert actions == ["promote", "promote", "promote", "roll_back", "roll_back"]


def test_promote_when_repeated_does_not_lengthen_the_history(
    registry: Registry, source: Path
) -> None:
    registry.publish(source, "m")
    registry.promote("m", "1")
    registry.promote("m", "1")
    assert len(registry.history("m")) == 1


def test_roll_back_when_the_earlier_version_is_damaged_changes_nothing(
    registry: Registry, source: Path
) -> None:
    for version in ("1", "2"):
        registry.publish(source, "m", version)
        registry.promote("m", version)
    (registry.root / "m" / "1" / "config.json").write_text("[]")
    with pytest.raises(IntegrityError):
        registry.roll_back("m")
    assert registry.resolve("m").version == "2"


def _truncate(text: str) -> str:
    return text[: len(text) // 2]


def _repoint(text: str) -> str:
    document = json.loads(text)
    document["history"][0]["version"] = "2"
    return json.dumps(document)


@pytest.mark.parametrize("damage", [_truncate, _repoint])
def test_resolve_when_the_aliases_are_damaged_is_refused(
    registry: Registry, source: Path, damage: Callable[[str], str]
) -> None:
    registry.publish(source, "m")
    registry.publish(source, "m")
    registry.promote("m", "1")
    path = registry.root / "m" / "aliases.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(IntegrityError, match=r"aliases\.json"):
        registry.resolve("m@production")


def test_entries_when_a_publication_is_unfinished_do_not_show_it(
    registry: Registry, source: Path
) -> None:
    registry.publish(source, "m")
    (registry.root / "m" / ".2.abc.tmp").mkdir()
    assert [entry.version for entry in registry.entries()] == ["1"]
    assert registry.publish(source, "m").version == "2"


def test_find_model_when_given_a_directory_or_a_reference_finds_both(
    registry: Registry, source: Path
) -> None:
    registry.publish(source, "m")
    assert find_model(str(source), registry.root) == source
    assert find_model("m@1", registry.root) == registry.root / "m" / "1"
    with pytest.raises(ModelNotFoundError, match="no directory"):
        find_model("runs/nothing", registry.root)


def test_publish_job_when_the_gate_passed_publishes_and_promotes(
    registry: Registry, source: Path
) -> None:
    entry = publish(source, PublishConfig(registry=str(registry.root), name="m"))
    assert entry.aliases == ("production",)
    assert registry.resolve("m").digest == entry.digest


@pytest.mark.parametrize("gate", [None, REFUSED])
def test_publish_job_when_the_gate_did_not_pass_refuses(
    registry: Registry, tmp_path: Path, gate: object
) -> None:
    source = _make_model(tmp_path / "refused", gate=gate)
    with pytest.raises(GateRefusedError):
        publish(source, PublishConfig(registry=str(registry.root), name="m"))
    assert registry.entries() == []


def test_publish_main_when_the_version_exists_exits_2(
    registry: Registry, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"name": "m", "version": "1", "registry": registry.root, "model": source}
    arguments = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1"
    assert main(arguments) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_publish_main_when_no_model_is_given_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", "name=m"]) == 2
    assert "`model` is required" in capsys.readouterr().err
