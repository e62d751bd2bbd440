from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
# Beyond these the moments of one run would spoil the start of every other one.
MOST_MEAN, MOST_VARIANCE = 1e9, 1e18
Moments = Mapping[str, tuple[float, float]]
"""Mean and variance of each input."""


def prior_moments() -> dict[str, tuple[float, float]]:
    """Return the moments of a run that nothing is known of."""
    return {name: (mean, sd * sd) for name, (mean, sd) in PRIORS.items()}


@dataclass
class Norms:
    """Exponentially weighted mean and variance of each input of one run."""

    moments: dict[str, tuple[float, float]] = field(default_factory=prior_moments)

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


@dataclass(frozen=True, slots=True)
class Experience:
    """Moments, and the number of steps that they were learned from."""

    moments: Moments = field(default_factory=prior_moments)
    steps: int = 0


def is_sound(mean: float, variance: float) -> bool:
    """Whether a run may start from these moments."""
    return abs(mean) <= MOST_MEAN and 0 <= variance <= MOST_VARIANCE


def pool(parts: Sequence[Experience]) -> Experience:
    """Make one experience of several, each weighted by its steps. Moments that are not sound teach nothing.

    An input that nobody taught anything about keeps the moments of the first part.
    """
    moments = {name: _pooled(parts, name) or parts[0].moments[name] for name in PRIORS}
    return Experience(moments, sum(part.steps for part in parts))


def _pooled(parts: Sequence[Experience], name: str) -> tuple[float, float] | None:
    """The moments of the union: its variance is that within the parts and that between them."""
    weighted = [(part.steps, *part.moments[name]) for part in parts if part.steps and is_sound(*part.moments[name])]
    total = sum(steps for steps, _, _ in weighted)
    if not total:
        return None
    mean = sum(steps * mean for steps, mean, _ in weighted) / total
    variance = sum(steps * (variance + (each - mean) ** 2) for steps, each, variance in weighted) / total
    return max(-MOST_MEAN, min(MOST_MEAN, mean)), min(MOST_VARIANCE, variance)
