from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from esper_rpc.breaker import OPEN, CircuitBreaker
from esper_rpc.proto.leyline.v1 import HealthStatus, SystemHealth
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.seed_slot import SeedSlot

HEALTHY, DEGRADED, UNHEALTHY = (
    HealthStatus.HEALTH_STATUS_HEALTHY,
    HealthStatus.HEALTH_STATUS_DEGRADED,
    HealthStatus.HEALTH_STATUS_UNHEALTHY,
)


class HostHealth:
    """Sums up how a seed host does: its breakers, what seeds did that they must not, and what stands in for them."""

    def __init__(
        self, *, breakers: Mapping[str, CircuitBreaker], violations_of: Callable[[str], int], slow_ms: float
    ) -> None:
        """`violations_of` tells of a seed how often it wrote, or would have written, to what is not its own."""
        self._breakers = breakers
        self._violations_of = violations_of
        self._slow_ms = slow_ms

    def of(self, seeds: Iterable[SeedSlot]) -> SystemHealth:
        """Return the health, with what speaks against it by name."""
        live = [slot for slot in seeds if slot.stage in lifecycle.LIVE]
        is_open = [name for name, breaker in self._breakers.items() if breaker.state == OPEN]
        unhealthy = {
            "breaker_open": is_open,
            "violations": [slot.seed_id for slot in live if self._violations_of(slot.seed_id)],
        }
        degraded = {
            "fallback": [slot.seed_id for slot in live if slot.fallback_used],
            "latency": [slot.seed_id for slot in live if slot.site.hook_ms > self._slow_ms],
        }
        return _health(unhealthy, degraded)


def _health(unhealthy: dict[str, list[str]], degraded: dict[str, list[str]]) -> SystemHealth:
    wrong = {name: ", ".join(who) for name, who in {**unhealthy, **degraded}.items() if who}
    is_unhealthy = any(unhealthy.values())
    return SystemHealth(
        status=UNHEALTHY if is_unhealthy else DEGRADED if wrong else HEALTHY,
        summary=", ".join(wrong),
        indicators=wrong,
    )
