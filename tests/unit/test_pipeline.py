from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import ConfigError
from jobs.config import PipelineConfig
from jobs.pipeline import check_stages

DEMO = Path(__file__).parents[2] / "deploy" / "recipes" / "demo.yaml"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSMITH_HOME", str(tmp_path))


def _config(*overrides: str) -> PipelineConfig:
    return load_config(PipelineConfig, DEMO, overrides)


def test_check_stages_when_nothing_is_trained_yet_plans_the_search() -> None:
    rows = dict(check_stages(_config()))
    assert rows["trials"] == "at most 14 in 2 generations, 2 at a time"
    assert rows["bf16 all"] == "100.0% of the bytes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.name=other", "search.model"),
        ("search.data=runs/elsewhere", "search.data"),
        ("deploy.model=another@production", "publish.name"),
        ("search.seq_len=1024", "exceeds the model's 512 positions"),
        ("search.schemes=[bf16]", "leave nothing to try"),
    ],
)
def test_check_stages_when_they_do_not_fit_each_other_are_refused(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stages(_config(override))
