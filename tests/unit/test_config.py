from pathlib import Path

import pytest
from pydantic import Field

from cluster.config import StrictModel, load_config, parse_config
from cluster.errors import ConfigError
from jobs.config import TrainConfig


class Inner(StrictModel):
    depth: int = Field(1, ge=1)
    width: int = 2


class Outer(StrictModel):
    name: str
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_when_overridden_takes_the_last_value(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {depth: 3}\n")
    config = load_config(Outer, path, ["inner.depth=5", "inner.depth=7", "name=b"])
    assert config == Outer(name="b", inner=Inner(depth=7))


def test_load_without_a_file_uses_overrides_on_defaults() -> None:
    assert load_config(Outer, None, ["name=x", "inner.width=9"]).inner.width == 9


def test_load_when_key_is_misspelt_names_it_and_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `inner\.dept`; did you mean `depth`"):
        load_config(Outer, write(tmp_path, "name: a\ninner: {dept: 3}\n"))


def test_load_when_key_is_misspelt_in_a_list_names_its_position(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `items\.0\.wdth`; did you mean `width`"):
        load_config(Outer, write(tmp_path, "name: a\nitems: [{wdth: 3}]\n"))


def test_load_with_several_mistakes_lists_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, "inner: {depth: 0}\nzzz: 1\n"))
    for part in ("`name` is required", "`inner.depth` = 0", "unknown key `zzz`"):
        assert part in caught.value.message


def test_load_when_type_is_wrong_shows_the_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`inner\.depth` = 'many'"):
        load_config(Outer, write(tmp_path, "name: a\ninner: {depth: many}\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [1,", "not valid YAML"), ("- 1\n", "expected keys and values, found list")],
)
def test_load_when_file_is_no_mapping_says_so(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(Outer, write(tmp_path, text))


def test_load_when_file_is_missing_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_config(Outer, tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["name", "=3", "a..b=1", "name.first=x", "name=[1"])
def test_load_when_override_is_malformed_names_it(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(Outer, write(tmp_path, "name: a\n"), [override])


def test_model_when_assigned_to_stays_as_it_was() -> None:
    config = Outer(name="a")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"  # type: ignore[misc]
    assert config.name == "a"


def test_replace_when_value_is_out_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Inner().replace(depth=0)


def test_parse_when_document_is_whole_returns_the_model() -> None:
    assert parse_config(Inner, {"depth": 2}, "here") == Inner(depth=2)


def test_config_when_a_number_is_given_as_truth_is_refused() -> None:
    for value in ("true", "yes"):
        with pytest.raises(ConfigError, match="`max_steps` = True: expected a number"):
            load_config(TrainConfig, overrides=["name=a", f"max_steps={value}"])
    assert load_config(TrainConfig, overrides=["name=a", "compile=yes"]).compile
