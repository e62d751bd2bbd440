from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from esper_rpc.proto.leyline.v1 import MetricPoint, TelemetryLevel, TelemetryPacket
from esper_rpc.telemetry import record_packets
from esper_rpc.telemetry.events import Detail, tell_event

SOURCE = "tolaria"


def tell(
    name: str, level: TelemetryLevel.ValueType, *, reason: str, step_index: int | None = None, **details: Detail
) -> None:
    """Tell an event of the trainer."""
    tell_event(SOURCE, name, level, reason=reason, step_index=step_index, **details)


def show(values: Mapping[str, float]) -> None:
    """Show the newest values of metrics by their names in the design, `tolaria.…`."""
    show_points([MetricPoint(name=name, value=value) for name, value in values.items()])


def show_points(points: Sequence[MetricPoint]) -> None:
    """Show the newest values of metrics with attributes."""
    record_packets([TelemetryPacket(packet_id=str(uuid.uuid4()), source_subsystem=SOURCE, metrics=points)])
