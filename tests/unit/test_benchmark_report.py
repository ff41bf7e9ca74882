"""How benchmarks measure in turn and what a report carries."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _report
from cluster.errors import ConfigError


def case(**rates: list[float]) -> dict[str, Any]:
    return _report.describe_case("one", {"size": 1}, rates, "base")


def test_alternate_when_measuring_takes_turns_and_drops_the_warm_up() -> None:
    calls: list[str] = []

    def contender(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    rates = _report.alternate(
        {"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=2, warmups=1
    )
    assert calls == ["a", "b"] * 3
    assert rates == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_describe_case_when_a_spell_was_slow_compares_within_rounds() -> None:
    described = case(base=[10.0, 2.0, 10.0], ours=[20.0, 4.0, 30.0])["contenders"]
    assert described["ours"]["median"] == 20.0
    assert (described["ours"]["lowest"], described["ours"]["highest"]) == (4.0, 30.0)
    assert described["ours"]["ratios"] == [2.0, 2.0, 3.0]
    assert described["ours"]["ratio_to_baseline"] == 2.0
    assert described["base"]["ratio_to_baseline"] == 1.0


def test_run_benchmark_when_it_succeeds_writes_all_that_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    def measure(arguments: argparse.Namespace) -> dict[str, Any]:
        assert arguments.quick
        return {"config": {"layers": 2}, "cases": [case(base=[10.0], ours=[20.0])]}

    assert _report.run_benchmark("faster", "x", measure, ["--quick", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["command"] == f"python -m benchmarks.x --quick --json {out}"
    assert document["config"] == {"layers": 2}
    assert document["versions"]["torch"]
    assert document["hardware"]["threads"] >= 1
    assert document["date"].endswith("+00:00")
    assert "2.00" in capsys.readouterr().out


def test_run_benchmark_when_it_fails_prints_the_error_and_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(_: argparse.Namespace) -> dict[str, Any]:
        raise ConfigError("no such thing")

    assert _report.run_benchmark("faster", "x", measure, []) == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_arguments_when_threads_are_not_positive_exit_with_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        _report.parse_arguments("faster", ["--threads", "0"])
    assert stopped.value.code == 2


def test_run_sections_when_one_fails_keeps_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    def measure(name: str) -> dict[str, Any]:
        if name == "broken":
            raise ConfigError("nothing to measure. Train a model first.")
        return {name: 1, "last": name}

    names = ["one", "two", "broken", "never"]
    assert _report.run_sections({"claim": "x"}, out, names, measure) == ConfigError.exit_code
    assert json.loads(out.read_text()) == {"claim": "x", "one": 1, "two": 1, "last": "two"}
    assert "Train a model first" in capsys.readouterr().err
