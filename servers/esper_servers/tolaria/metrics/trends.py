from __future__ import annotations

import math

SMOOTHING = 0.1


class Trend:
    """Exponentially weighted mean and variance of a series. What is no number is passed over."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self._smoothing = smoothing
        self.count = 0
        self.mean = 0.0
        self.variance = 0.0
        self.delta = 0.0
        """From the value before to the last one."""
        self._last = 0.0

    @property
    def deviation(self) -> float:
        """The square root of the variance."""
        return math.sqrt(self.variance)

    def add(self, value: float) -> bool:
        """Take a value; whether it was a number."""
        if not math.isfinite(value):
            return False
        if not self.count:
            self.mean = self._last = value
        difference = value - self.mean
        step = self._smoothing * difference
        mean, variance = self.mean + step, (1 - self._smoothing) * (self.variance + difference * step)
        # A leap beyond what a float holds begins the series anew.
        self.mean, self.variance = (mean, variance) if math.isfinite(variance) else (value, 0.0)
        self.delta, self._last = value - self._last, value
        self.count += 1
        return True
