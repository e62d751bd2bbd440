from __future__ import annotations

import math
from dataclasses import dataclass

LOSS_SMOOTHING = 0.1


@dataclass
class Progress:
    """How far the training is, as far as a seed host sees it."""

    global_step: int = 0
    loss: float = math.nan
    """Smoothed; NaN until there is one."""

    losses: int = 0
    """How many there were."""

    def observe(self, loss: float, global_step: int) -> None:
        """Note the loss of the step that just ended."""
        known = math.isfinite(self.loss) and math.isfinite(loss)
        self.loss = self.loss + LOSS_SMOOTHING * (loss - self.loss) if known else loss
        self.global_step = global_step
        self.losses += 1

    def loss_or_none(self) -> float | None:
        """Return the loss when it is a number."""
        return self.loss if math.isfinite(self.loss) else None
