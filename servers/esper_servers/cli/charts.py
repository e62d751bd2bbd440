"""How the charts of the commands look."""

from __future__ import annotations

from typing import Any


def figure(*titles: str) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, one beside the other, a title each."""
    from matplotlib.figure import Figure

    found = Figure(figsize=(7.2 if len(titles) == 1 else 4.2 * len(titles), 3.4), layout="constrained")
    axes = [found.add_subplot(1, len(titles), number) for number in range(1, len(titles) + 1)]
    for each, title in zip(axes, titles, strict=True):
        each.set_title(title, loc="left")
        each.grid(visible=True, alpha=0.25)
    return found, axes
