from __future__ import annotations

import math
from dataclasses import dataclass

FAST, SLOW = 0.2, 0.02


@dataclass(slots=True)
class MovingWindow:
    """Exponential means of a number at two speeds, and its variance."""

    fast: float | None = None
    slow: float = 0.0
    variance: float = 0.0
    last: float | None = None

    def update(self, value: float) -> float:
        """Take in a value and return how far it lies above the last one; 0 for the first, NaN passes."""
        if not math.isfinite(value):
            return math.nan
        delta = 0.0 if self.last is None else value - self.last
        if self.fast is None:
            self.fast = self.slow = value
        self.fast += FAST * (value - self.fast)
        self.slow += SLOW * (value - self.slow)
        off = value - self.fast
        self.variance += FAST * (off * off - self.variance)
        self.last = value
        return delta

    @property
    def trend(self) -> float:
        """Positive while the value falls."""
        return self.slow - (self.fast or 0.0)

    @property
    def deviation(self) -> float:
        """Standard deviation."""
        return math.sqrt(max(0.0, self.variance))

    @property
    def volatility(self) -> float:
        """Standard deviation over mean."""
        return self.deviation / max(1e-6, abs(self.fast or 0.0))

    @property
    def scale(self) -> float:
        """What counts as one unit of the value: its mean, and never less than 1."""
        return max(1.0, abs(self.fast or 0.0))
