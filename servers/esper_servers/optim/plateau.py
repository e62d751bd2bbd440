from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .schedules import Adaptive


@dataclass(frozen=True, kw_only=True, slots=True)
class Plateau:
    """What a group on an adaptive schedule remembers of the losses. ReduceLROnPlateau comes to the same rates."""

    share: float = 1.0
    """Of the rate that the schedule gives."""
    best: float = math.inf
    not_better: int = 0
    resting: int = 0

    def after(self, loss: float, schedule: Adaptive) -> Plateau:
        """Return what is remembered after one more loss; one that is no number is not better."""
        if loss < self.best * (1.0 - schedule.threshold):
            found = dataclasses.replace(self, best=loss, not_better=0)
        else:
            found = dataclasses.replace(self, not_better=self.not_better + 1)
        if found.resting:
            found = dataclasses.replace(found, resting=found.resting - 1, not_better=0)
        if found.not_better <= schedule.patience:
            return found
        return dataclasses.replace(found, share=found.share * schedule.factor, not_better=0, resting=schedule.cool_down)
