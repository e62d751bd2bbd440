from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from esper_rpc.proto.leyline.v1 import MetricPoint, SystemHealth, TelemetryEvent, TelemetryPacket
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.seed_slot import SeedSlot

from .notices import INFO

MetricsOf = Callable[[SeedSlot], Iterable[MetricPoint]]
SEED_METRICS = ("stage", "alpha", "alpha_steps", "kernel_attached", "last_kernel_latency_ms", "fallback_used")
"""What every packet of a seed has, as `kasmina.seed.<name>` (requirements 4.6)."""


def flush(
    seeds: Iterable[SeedSlot],
    step_index: int,
    events: Sequence[TelemetryEvent],
    health: SystemHealth,
    metrics_of: MetricsOf,
) -> list[TelemetryPacket]:
    """Return one packet per seed that grows or has fossilised, and a global one with what happened.

    `metrics_of` gives what else is known of a seed.
    """
    slots = list(seeds)
    shown = [slot for slot in slots if slot.stage in lifecycle.LIVE or slot.stage == lifecycle.FOSSILIZED]
    active = sum(slot.stage in lifecycle.LIVE for slot in slots)
    overall = _packet(f"global-{step_index}", MetricPoint(name="kasmina.seeds.active", value=float(active)))
    overall.events.extend(events)
    overall.level = max([overall.level, *(event.level for event in events)])
    overall.system_health.CopyFrom(health)
    return [*(_of_seed(slot, step_index, metrics_of) for slot in shown), overall]


def untold(slot: SeedSlot) -> list[str]:
    """Name the metrics that a packet of this seed would lack, or give no number for."""
    known = _metrics_of(slot)
    return [name for name in SEED_METRICS if not math.isfinite(known.get(name, math.nan))]


def _metrics_of(slot: SeedSlot) -> Mapping[str, float]:
    return {
        "stage": float(slot.stage),
        "alpha": slot.site.alpha,
        "alpha_steps": float(slot.schedule.step),
        "kernel_attached": float(slot.site.seed is not None),
        "last_kernel_latency_ms": slot.site.hook_ms,
        "fallback_used": float(slot.fallback_used),
    }


def _of_seed(slot: SeedSlot, step_index: int, metrics_of: MetricsOf) -> TelemetryPacket:
    points = [_point(f"kasmina.seed.{name}", value, slot.seed_id) for name, value in _metrics_of(slot).items()]
    return _packet(f"{slot.seed_id}-{step_index}", *points, *metrics_of(slot))


def _point(name: str, value: float, seed_id: str) -> MetricPoint:
    point = MetricPoint(name=name, value=value)
    # A map that is handed over in the call takes as long again as all the rest.
    point.attributes["seed_id"] = seed_id
    return point


def _packet(packet_id: str, *metrics: MetricPoint) -> TelemetryPacket:
    return TelemetryPacket(packet_id=packet_id, source_subsystem="kasmina", level=INFO, metrics=metrics)
