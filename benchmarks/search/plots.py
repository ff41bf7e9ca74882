"""What every contender found, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jobs.search.pareto import Point


def draw_fronts(fronts: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw perplexity against bytes and against latency, a colour for each contender.

    Fronts are points by contender, as JSON has them.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sized, timed = figure.subplots(1, 2, sharey=True)
    for number, (name, front) in enumerate(fronts.items()):
        points = [Point.model_validate(point) for point in front]
        increases = [100 * point.perplexity_increase for point in points]
        style = {"s": 60 if name == "ours" else 22, "alpha": 0.8, "color": f"C{number}"}
        sized.scatter([100 * p.size_ratio for p in points], increases, label=name, **style)
        timed.scatter([100 * (p.latency_ratio or 0) for p in points], increases, **style)
    sized.set_xlabel("bytes, % of bf16")
    timed.set_xlabel("time of a request, % of bf16")
    sized.set_ylabel("perplexity increase, %")
    sized.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
