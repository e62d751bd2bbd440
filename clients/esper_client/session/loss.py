from __future__ import annotations

from typing import Protocol


class Loss(Protocol):
    """A number, or a tensor of one element."""

    def __float__(self) -> float: ...


def read_loss(loss: Loss) -> float:
    """Read a number, or a tensor of one element without its graph."""
    return float(loss.detach() if hasattr(loss, "detach") else loss)
