from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from esper_rpc.proto.leyline.v1 import MetricPoint, TelemetryEvent, TelemetryLevel, TelemetryPacket

from . import lifecycle
from .seed_slot import SeedSlot

MetricsOf = Callable[[SeedSlot], Iterable[MetricPoint]]


def flush(
    seeds: Iterable[SeedSlot], step_index: int, events: Sequence[TelemetryEvent], metrics_of: MetricsOf
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
    return [*(_of_seed(slot, step_index, metrics_of) for slot in shown), overall]


def _of_seed(slot: SeedSlot, step_index: int, metrics_of: MetricsOf) -> TelemetryPacket:
    attributes = {"seed_id": slot.seed_id}
    return _packet(
        f"{slot.seed_id}-{step_index}",
        MetricPoint(name="kasmina.seed.stage", value=float(slot.stage), attributes=attributes),
        MetricPoint(name="kasmina.seed.alpha", value=slot.site.alpha, attributes=attributes),
        *metrics_of(slot),
    )


def _packet(packet_id: str, *metrics: MetricPoint) -> TelemetryPacket:
    return TelemetryPacket(
        packet_id=packet_id, source_subsystem="kasmina", level=TelemetryLevel.TELEMETRY_LEVEL_INFO, metrics=metrics
    )
