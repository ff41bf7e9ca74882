"""The search's benchmark: every contender gets the same seconds, and all are measured alike."""

import math
from pathlib import Path

import pytest

from benchmarks.search.contenders import Bench, compare, evenly, play, ratios
from benchmarks.search.plots import draw_fronts
from cluster.errors import ConfigError
from jobs.config import GateConfig, Rung
from jobs.search.plan import Search
from jobs.search.space import UNCHANGED
from jobs.search.tasks import Result, Task
from tests.unit.search_fakes import answer, space

SECONDS = {"times": 20.0, "probe": 2.0, "rung": 3.0, "request": 1.0}


class FakeBench(Bench):
    """Answers as a worker would, each task for its seconds."""

    def run(self, task: Task) -> Result:
        if task not in self.results:
            result = answer(self.search.space, task)
            self.results[task] = result.replace(seconds=SECONDS[task.stage])
        return self.results[task]


def bench() -> FakeBench:
    of = space(
        granularity="fused",
        layers_per_group=1,
        rungs=(Rung(eval_sequences=8, keep_ratio=1.0, real=True),),
        num_trials=9,
        generations=3,
        gate=GateConfig(max_perplexity_increase=0.5, max_size_ratio=0.9),
    )
    search = Search(
        config=of.config,
        run_dir=Path("run"),
        model=Path("model"),
        data=Path("data"),
        space=of,
        fingerprint="",
    )
    return FakeBench(search, lambda line: None)


def test_compare_when_all_have_searched_gave_each_the_seconds_of_ours() -> None:
    played = bench()
    found = compare(played)
    assert set(found) == {"ours", "uniform", "knapsack", "knapsack3", "tpe", "random"}
    ours = found["ours"]
    num_probes = len(played.search.space.groups)
    assert len(ours.models) == 9
    assert ours.seconds == 20 + 2 * num_probes + 3 * 10 + 9
    one_model_s = SECONDS["rung"] + SECONDS["request"]
    for name in ("tpe", "random"):
        assert ours.seconds <= found[name].seconds < ours.seconds + one_model_s
    for each in found.values():
        assert UNCHANGED not in each.models
        assert len(set(each.models)) == len(each.models)
    volumes = {name: played.hypervolume(each.models) for name, each in found.items()}
    assert all(0 < volume < 1 for volume in volumes.values())
    assert ratios(volumes)["uniform"] == pytest.approx(volumes["ours"] / volumes["uniform"] - 1)


def test_play_when_a_model_is_asked_for_again_costs_nothing() -> None:
    played = bench()
    model = played.search.space.uniform(1)
    found = play("same", played, math.inf, iter([model, model, model]))
    assert found.models == (model,)
    assert found.seconds == SECONDS["rung"] + SECONDS["rung"] + SECONDS["request"]


def test_ratios_when_a_contender_found_nothing_say_what_to_raise() -> None:
    with pytest.raises(ConfigError, match="max_perplexity_increase"):
        ratios({"ours": 0.5, "random": 0.0})


def test_evenly_when_cut_off_is_spread_over_the_whole() -> None:
    front = [(number,) for number in range(9)]
    order = evenly(front)
    assert sorted(order) == front
    assert set(order[:3]) == {(0,), (4,), (8,)}


def test_fronts_when_drawn_make_a_picture(tmp_path: Path) -> None:
    point = {"perplexity_increase": 0.01, "size_ratio": 0.4, "latency_ratio": 0.8}
    draw_fronts({"ours": [point], "tpe": [point, point]}, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").stat().st_size > 1000
