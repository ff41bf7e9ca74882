"""The plot beside the report: perplexity against bytes of every recipe.

Takes the report's `contenders`; writes a PNG. It does not know how they were measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from jobs.plots import ACCENT, INK, MUTED

_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(contenders: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw increases of perplexity with their intervals over the share of bfloat16's bytes.

    Where an interval reaches zero or below it, its bar leaves the logarithmic axis.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, found in contenders.items():
            increase = found.get("increase")
            if increase is None or "size_ratio" not in found or increase["point"] <= 0:
                continue
            size, point = 100 * found["size_ratio"], 100 * increase["point"]
            below, above = point - 100 * increase["lower"], 100 * increase["upper"] - point
            is_pruned = found["size_ratio"] == 1
            axes.errorbar(
                size,
                point,
                yerr=[[below], [above]],
                marker="o",
                markersize=4,
                capsize=2,
                color=MUTED if is_pruned else ACCENT,
            )
            axes.annotate(
                name, (size, point), xytext=(5, 2), textcoords="offset points", color=INK, size=7
            )
        axes.set_yscale("log")
        axes.set_xlabel("bytes of the weights, % of bfloat16")
        axes.set_ylabel("increase of perplexity, %")
        axes.set_title("Compressed without training; 95% intervals", loc="left")
        axes.grid(alpha=0.2)
        figure.savefig(path, dpi=120)
