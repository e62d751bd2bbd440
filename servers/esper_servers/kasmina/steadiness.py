from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

WINDOW = 8
"""Steps that are compared: the second half with the first."""
MOST_SWINGS = 3
"""Changes of direction within a window; more is an oscillation."""
SMOOTHING = 0.1
_SAMPLES = 4
_LEAST = 1e-12


def strength(s: Tensor, h: Tensor) -> Tensor:
    """Return how strong the output of a seed is beside that of its host, a scalar on their device.

    Taken of a few samples of the batch, since a pass over a whole feature map costs as much as blending it.
    """
    s, h = s.detach()[:_SAMPLES].float(), h.detach()[:_SAMPLES].float()
    norm = torch.linalg.vector_norm
    beside: Tensor = norm(s) / (norm(h) + _LEAST)
    return beside


class Steadiness:
    """How steady a seed's output has been while it is blended in, and what it takes of a forward pass."""

    def __init__(self, strengths: Sequence[float] = ()) -> None:
        self.strengths = deque(strengths, maxlen=WINDOW)
        self.hook_ms = 0.0
        """Smoothed, in milliseconds; on a device what it takes to launch."""

    def note(self, strength: float, hook_ms: float) -> None:
        """Note a step."""
        self.hook_ms += (SMOOTHING if self.hook_ms else 1.0) * (hook_ms - self.hook_ms)
        self.strengths.append(strength)

    def drift(self) -> float:
        """Return by what share the strength has changed within the window; infinity while there are too few steps."""
        if len(self.strengths) < WINDOW:
            return float("inf")
        seen = list(self.strengths)
        before, after = sum(seen[: WINDOW // 2]), sum(seen[WINDOW // 2 :])
        return abs(after - before) / max(before, _LEAST)

    def swings(self, share: float) -> bool:
        """Whether the strength goes up and down, each time by more than a share of it."""
        least = share * sum(self.strengths) / max(len(self.strengths), 1)
        moves = [after - before for before, after in pairwise(self.strengths)]
        large = [move for move in moves if abs(move) > least]
        return sum(before * after < 0 for before, after in pairwise(large)) > MOST_SWINGS
