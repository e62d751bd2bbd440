from __future__ import annotations

import math
from dataclasses import dataclass, field

FACTOR = 0.1
EPSILON = 1e-6
# Mean and standard deviation before anything was seen (requirements 2.5).
PRIORS: dict[str, tuple[float, float]] = {
    "loss": (0.8, 0.3),
    "gradient_norm": (1.0, 0.5),
    "samples_per_s": (4500.0, 500.0),
    "hook_latency_ms": (12.0, 6.0),
}
LIMIT = 8.0


@dataclass
class Norms:
    """Exponentially weighted mean and variance of each input of one run."""

    moments: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {name: (mean, sd * sd) for name, (mean, sd) in PRIORS.items()}
    )

    def update(self, name: str, value: float) -> float:
        """Scale a value by what was seen before it, then take it in. NaN stays NaN and teaches nothing."""
        scaled = self.scale(name, value)
        if math.isfinite(value):
            mean, variance = self.moments[name]
            delta = value - mean
            self.moments[name] = (mean + FACTOR * delta, (1 - FACTOR) * (variance + FACTOR * delta * delta))
        return scaled

    def scale(self, name: str, value: float) -> float:
        """Return the value in standard deviations from the mean, clipped."""
        if not math.isfinite(value):
            return math.nan
        mean, variance = self.moments[name]
        return max(-LIMIT, min(LIMIT, (value - mean) / math.sqrt(variance + EPSILON)))
