from __future__ import annotations

from typing import NamedTuple

from esper_rpc.proto.leyline.v1 import HealthStatus

# What a signal demands, by rising severity.
NOTHING, NO_SEED, OPTIMIZER_FOR_SEED, OPTIMIZER, PAUSE, PAUSE_AND_HOLD = range(6)
DEMAND_NAMES = ("nothing", "no_seed", "optimizer_for_seed", "optimizer", "pause", "pause_and_hold")
_STATUS = (
    HealthStatus.HEALTH_STATUS_HEALTHY, HealthStatus.HEALTH_STATUS_DEGRADED, HealthStatus.HEALTH_STATUS_DEGRADED,
    HealthStatus.HEALTH_STATUS_DEGRADED, HealthStatus.HEALTH_STATUS_UNHEALTHY, HealthStatus.HEALTH_STATUS_CRITICAL,
)  # fmt: skip


class Reading(NamedTuple):
    """What one signal says of one step."""

    demand: int
    """OPTIMIZER_FOR_SEED adjusts the optimizer where a seed operation was due; PAUSE_AND_HOLD enters conservative
    mode too."""
    score: float
    """0 for safe, 1 for the worst."""
    reason: str = ""

    @property
    def status(self) -> HealthStatus.ValueType:
        """Nominal (healthy), degraded or unhealthy (also critical)."""
        return _STATUS[self.demand]


def nominal(score: float = 0.0) -> Reading:
    """Return a reading that demands nothing."""
    return Reading(NOTHING, score)


def linear(value: float, base: float, emergency: float) -> float:
    """Return 0 up to the base, 1 from the emergency on, linear between; NaN is 0."""
    if emergency <= base:
        return float(value > base)
    return min(1.0, max(0.0, (value - base) / (emergency - base)))
