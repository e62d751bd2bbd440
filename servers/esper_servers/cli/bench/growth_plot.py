from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper_servers.cli import charts

Points = Sequence[Mapping[str, Any]]
_COLOURS = {
    "open_run": "#8a8a8a", "total": "#0b6e4f", "inference": "#3f6fb5", "risk": "#b3261e", "features": "#c9a227",
}  # fmt: skip
# Text stays text with one family, and no name is random: small, and the same figures give the same file.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "growth", "font.sans-serif": ["DejaVu Sans"]}


def draw(path: Path, rows: Mapping[str, Points], plan: str) -> None:
    """Draw the medians along each axis in a panel of its own, and the p95 of the whole step as a shade over it."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axes = charts.figure(*(f"With {axis}, {plan} plan" for axis in rows))
        for panel, (axis, points) in zip(axes, rows.items(), strict=True):
            _draw_panel(panel, axis, points)
        axes[0].set_ylabel("ms")
        axes[0].legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_panel(panel: Any, axis: str, points: Points) -> None:
    sizes = [point[axis] for point in points]
    for part, colour in _COLOURS.items():
        panel.plot(sizes, [point[part]["p50_ms"] for point in points], label=part, color=colour)
    total = [point["total"] for point in points]
    middle, high = ([each[key] for each in total] for key in ("p50_ms", "p95_ms"))
    panel.fill_between(sizes, middle, high, alpha=0.15, color=_COLOURS["total"])
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_xticks(sizes, map(str, sizes))
