from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from prometheus_client import Counter, Gauge

from esper_rpc.proto.leyline.v1 import TelemetryLevel, TelemetryPacket

PacketSink = Callable[[Sequence[TelemetryPacket]], None]
"""Gets the packets of one step. It is called by the training thread, so it must not wait."""

_EVENTS = Counter("esper_telemetry_events", "Events in telemetry packets.", ["level", "source"])


def record_packets(packets: Sequence[TelemetryPacket]) -> None:
    """Keep the newest value of every metric as a gauge, and count events by level."""
    for packet in packets:
        for point in packet.metrics:
            _gauge_of(point.name, tuple(point.attributes.items())).set(point.value)
        if packet.events:
            level = TelemetryLevel.Name(packet.level).removeprefix("TELEMETRY_LEVEL_")
            _EVENTS.labels(level, packet.source_subsystem).inc(len(packet.events))


# By what a point says, in whatever order: to look a gauge up by its labels takes twice as long as to set it.
@cache
def _gauge_of(name: str, attributes: tuple[tuple[str, str], ...]) -> Gauge:
    labels = dict(sorted(attributes))
    gauge = _gauge(name, tuple(labels))
    return gauge.labels(*labels.values()) if labels else gauge


@cache
def _gauge(name: str, labels: tuple[str, ...]) -> Gauge:
    prometheus_name = "esper_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
    return Gauge(prometheus_name, f"The newest {name}.", labels, multiprocess_mode="livemostrecent")
