"""Plots as SVG text, for HTML reports.

Takes plain series; gives `<svg>` elements that scale with the page. It does not know files.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, ACCENT, GOOD = "#1f2430", "#8a93a6", "#3b6fd4", "#1f9d6b"
_STYLE = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "raysmith",
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = ACCENT
    dots: bool = False


@dataclass(frozen=True)
class ParetoPoint:
    """One model: bytes or latency and perplexity relative to bf16, and what it is.

    `low` and `high` are an interval of the perplexity increase.
    """

    x_ratio: float
    increase: float
    on_front: bool
    is_winner: bool
    low: float | None = None
    high: float | None = None


def curves(title: str, lines: Sequence[Curve], *, x: str, y: str, level: tuple[str, float]) -> str:
    """Return lines over steps, with one dashed level and its name."""
    with _figure(title) as (axes, out):
        for line in lines:
            style = {"marker": "o", "linestyle": "-"} if line.dots else {"linewidth": 1.2}
            axes.plot(line.x, line.y, label=line.label, color=line.color, markersize=4, **style)
        axes.axhline(level[1], color=MUTED, linestyle="--", linewidth=1, label=level[0])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(frameon=False)
    return out[0]


def pareto(
    title: str,
    points: Sequence[ParetoPoint],
    *,
    limits: tuple[float | None, float],
    x: str = "size, % of bf16",
) -> str:
    """Return bytes or latency against perplexity increase; `limits` are those of x and of y."""
    with _figure(title) as (axes, out):
        for front, color, label in ((False, MUTED, "tried"), (True, ACCENT, "Pareto front")):
            chosen = [p for p in points if p.on_front == front]
            ends = [
                [100 * (p.increase - low) for p, low in _ends(chosen, "low")],
                [100 * (high - p.increase) for p, high in _ends(chosen, "high")],
            ]
            axes.errorbar(
                [100 * p.x_ratio for p in chosen],
                [100 * p.increase for p in chosen],
                yerr=ends,
                color=color,
                label=label,
                fmt="o",
                markersize=5,
                elinewidth=1,
            )
        for winner in (p for p in points if p.is_winner):
            axes.scatter(
                [100 * winner.x_ratio],
                [100 * winner.increase],
                marker="*",
                s=220,
                color=GOOD,
                label="winner",
                zorder=3,
            )
        if limits[0] is not None:
            axes.axvline(100 * limits[0], color=MUTED, linestyle="--", linewidth=1)
        axes.axhline(100 * limits[1], color=MUTED, linestyle="--", linewidth=1, label="limits")
        axes.set_xlabel(x)
        axes.set_ylabel("perplexity increase, %")
        axes.legend(frameon=False)
    return out[0]


def grouped_bars(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, y: str
) -> str:
    """Return one bar for each group and series, on a logarithmic axis; none for 0 or less."""
    width = 0.8 / max(1, len(series))
    with _figure(title) as (axes, out):
        for number, (name, values) in enumerate(series.items()):
            places = [place + (number + 0.5) * width - 0.4 for place in range(len(groups))]
            axes.bar(places, [v if v > 0 else math.nan for v in values], width=width, label=name)
        axes.set_yscale("log")
        axes.set_xticks(range(len(groups)), groups, rotation=90, fontsize=7)
        axes.set_ylabel(y)
        axes.legend(frameon=False, fontsize=8)
    return out[0]


def bars(title: str, names: Sequence[str], values: Sequence[float], *, unit: str) -> str:
    """Return one horizontal bar for each name, the last in the accent colour."""
    with _figure(title, height=2.2) as (axes, out):
        colors = [MUTED] * (len(names) - 1) + [GOOD]
        drawn = axes.barh(list(names), list(values), color=colors, height=0.55)
        axes.bar_label(drawn, labels=[f"{value:,.3g} {unit}" for value in values], padding=6)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(values))
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return out[0]


def _ends(points: Sequence[ParetoPoint], end: str) -> list[tuple[ParetoPoint, float]]:
    """Return each point with an end of its interval, or its middle where it has none."""
    found = ((point, getattr(point, end)) for point in points)
    return [(point, point.increase if value is None else value) for point, value in found]


@contextmanager
def _figure(title: str, height: float = 3.4) -> Iterator[tuple[Axes, list[str]]]:
    out: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left", fontweight="bold")
        yield axes, out
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        out.append(svg[svg.index("<svg") :])
