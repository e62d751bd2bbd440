from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

WINDOW = 8
"""Steps that are compared: the second half with the first."""
MOST_SWINGS = 3
"""Changes of direction within a window; more is an oscillation."""
_LEAST_SAMPLES = 4
_ELEMENTS = 2**16
_LEAST = 1e-12


def strength(s: Tensor, h: Tensor) -> Tensor:
    """Return how strong the output of a seed is beside that of its host, a scalar on their device.

    Taken of a part of the batch where that is large, since a pass over a whole feature map costs as much as blending
    it. Of few numbers the strength would be the noise of the batch.
    """
    samples = max(_LEAST_SAMPLES, _ELEMENTS // max(h.shape[1:].numel(), 1))
    s, h = s.detach()[:samples].float(), h.detach()[:samples].float()
    norm = torch.linalg.vector_norm
    beside: Tensor = norm(s) / (norm(h) + _LEAST)
    return beside


class Steadiness:
    """How steady a seed's output has been while it is blended in, and what it takes of a forward pass."""

    def __init__(self, strengths: Sequence[float] = ()) -> None:
        self.strengths = deque(strengths, maxlen=WINDOW)
        self._passes: deque[float] = deque(maxlen=WINDOW)

    @property
    def hook_ms(self) -> float:
        """The median of the last passes in milliseconds; on a device what they take to launch.

        One that compiled, or waited for the machine, does not count.
        """
        return statistics.median(self._passes) if self._passes else 0.0

    def note(self, strength: float, hook_ms: float) -> None:
        """Note a step."""
        self._passes.append(hook_ms)
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
