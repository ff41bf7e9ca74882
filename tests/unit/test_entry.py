import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import StrictModel
from cluster.errors import ConfigError, TrainingError
from jobs.entry import Job, run_job


class Settings(StrictModel):
    name: str = "x"
    steps: int = 3


def make_job(run=None) -> tuple[Job[Settings], list[Settings]]:
    ran: list[Settings] = []

    def default_run(config: Settings) -> dict[str, object]:
        ran.append(config)
        return {"steps": config.steps, "loss": 1.23456789}

    return (
        Job(
            name="train",
            help="help",
            config=Settings,
            plan=lambda c: [("steps", str(c.steps))],
            run=run or default_run,
        ),
        ran,
    )


def test_run_job_with_overrides_runs_the_overridden_config(tmp_path: Path, capsys):
    job, ran = make_job()
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\n")
    assert run_job(job, ["--config", str(file), "--set", "name=y", "--json"]) == 0
    assert ran == [Settings(name="y", steps=5)]
    assert json.loads(capsys.readouterr().out) == {"steps": 5, "loss": 1.23456789}


def test_run_job_when_dry_prints_the_plan_and_runs_nothing(capsys):
    job, ran = make_job()
    assert run_job(job, ["--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": "3"}
    assert ran == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stepz=4", "did you mean `steps`?"),
        ("steps=many", "`steps` = 'many'"),
        ("steps", "expected key.subkey=value"),
    ],
)
def test_run_job_when_input_is_wrong_exits_2_and_names_it(override: str, expected: str, capsys):
    job, ran = make_job()
    assert run_job(job, ["--set", override]) == 2
    assert expected in capsys.readouterr().err
    assert ran == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(TrainingError("lost"), 1), (ConfigError("wrong"), 2), (KeyboardInterrupt(), 130)],
)
def test_run_job_when_the_run_raises_returns_its_exit_code(error: BaseException, code: int):
    def fail(_: Settings) -> dict[str, object]:
        raise error

    job, _ = make_job(fail)
    assert run_job(job, []) == code


def test_run_job_when_a_bug_raises_does_not_hide_it():
    def fail(_: Settings) -> dict[str, object]:
        raise AssertionError("a bug")

    job, _ = make_job(fail)
    with pytest.raises(AssertionError, match="a bug"):
        run_job(job, [])


def test_run_job_when_the_result_is_refused_prints_it_and_exits_1(capsys):
    job, ran = make_job()
    refusing = replace(job, refusal=lambda values: f"loss {values['loss']:.1f} is too high")
    assert run_job(refusing, ["--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"] == 3
    assert "loss 1.2 is too high" in shown.err
    assert len(ran) == 1
