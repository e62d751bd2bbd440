from __future__ import annotations

from collections import deque
from typing import Final

from esper_rpc.telemetry.metrics import GRADIENT_CONFLICTS

WINDOW: Final = 100
"""How many steps the rate is over."""


class ConflictRate:
    """The share of gradients that were in conflict lately."""

    def __init__(self, source: str, window: int = WINDOW) -> None:
        self._counter = GRADIENT_CONFLICTS.labels(source)
        self._steps: deque[tuple[int, int]] = deque(maxlen=window)

    def note(self, opposed: int, compared: int) -> None:
        """Note a step: how many were compared, and how many of them were in conflict."""
        self._counter.inc(opposed)
        self._steps.append((opposed, compared))

    def metrics(self) -> dict[str, float]:
        """Return what a step may tell of it: nothing before anything was compared."""
        compared = sum(count for _, count in self._steps)
        if not compared:
            return {}
        return {"grad_conflict_rate": sum(count for count, _ in self._steps) / compared}
