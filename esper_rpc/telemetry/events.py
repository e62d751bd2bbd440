from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

import structlog

from esper_rpc.proto.leyline.v1 import MessagePriority, TelemetryEvent, TelemetryLevel, TelemetryPacket

from .packets import record_packets

log = structlog.get_logger(__name__)

PRIORITY_OF: Mapping[TelemetryLevel.ValueType, MessagePriority.ValueType] = {
    TelemetryLevel.TELEMETRY_LEVEL_INFO: MessagePriority.MESSAGE_PRIORITY_NORMAL,
    TelemetryLevel.TELEMETRY_LEVEL_WARNING: MessagePriority.MESSAGE_PRIORITY_NORMAL,
    TelemetryLevel.TELEMETRY_LEVEL_ERROR: MessagePriority.MESSAGE_PRIORITY_HIGH,
    TelemetryLevel.TELEMETRY_LEVEL_CRITICAL: MessagePriority.MESSAGE_PRIORITY_CRITICAL,
}
"""By severity. HIGH and CRITICAL take the emergency lane."""
_LOG_LEVEL = {
    TelemetryLevel.TELEMETRY_LEVEL_INFO: logging.INFO,
    TelemetryLevel.TELEMETRY_LEVEL_WARNING: logging.WARNING,
    TelemetryLevel.TELEMETRY_LEVEL_ERROR: logging.ERROR,
    TelemetryLevel.TELEMETRY_LEVEL_CRITICAL: logging.CRITICAL,
}
Detail = str | int | float


def tell_event(
    source: str,
    name: str,
    level: TelemetryLevel.ValueType,
    *,
    reason: str,
    step_index: int | None = None,
    **details: Detail,
) -> TelemetryPacket:
    """Log an event and count it with its packet, which is returned; keep it off the step path.

    `step_index` is for what happens in a step, the global step of the trainer.
    """
    indicators: dict[str, Detail] = {"reason": reason, "priority": name_of(PRIORITY_OF[level])}
    if step_index is not None:
        indicators["step_index"] = step_index
    indicators |= details
    log.log(_LOG_LEVEL[level], name, **indicators)
    event = TelemetryEvent(
        event_id=str(uuid.uuid4()),
        description=name,
        level=level,
        attributes={key: str(value) for key, value in indicators.items()},
    )
    packet = TelemetryPacket(packet_id=event.event_id, source_subsystem=source, level=level, events=[event])
    packet.timestamp.GetCurrentTime()
    record_packets([packet])
    return packet


def name_of(priority: MessagePriority.ValueType) -> str:
    """Return how operators read a priority: `HIGH`."""
    return MessagePriority.Name(priority).removeprefix("MESSAGE_PRIORITY_")
