from __future__ import annotations

from typing import Any


class StepLoss:
    """The loss of a training step that a framework computes in parts; tensors are added where they are."""

    def __init__(self) -> None:
        self._total: Any = None
        self._parts = 0

    def add(self, part: Any) -> None:
        """Add the loss of one micro-batch, without its graph."""
        part = part.detach() if hasattr(part, "detach") else part
        self._total = part if self._total is None else self._total + part
        self._parts += 1

    def take_mean(self) -> Any:
        """Return the mean since the last call, None when there was no loss."""
        total, parts = self._take()
        return total / parts if parts else None

    def take_sum(self) -> Any:
        """Return the sum since the last call, None when there was no loss."""
        return self._take()[0]

    def _take(self) -> tuple[Any, int]:
        taken = self._total, self._parts
        self._total, self._parts = None, 0
        return taken
