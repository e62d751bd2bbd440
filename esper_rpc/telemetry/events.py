from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping

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
"""By severity."""
EMERGENCY_LANE = frozenset({MessagePriority.MESSAGE_PRIORITY_HIGH, MessagePriority.MESSAGE_PRIORITY_CRITICAL})
"""The priorities that take it."""
_LOG_LEVEL = {
    TelemetryLevel.TELEMETRY_LEVEL_INFO: logging.INFO,
    TelemetryLevel.TELEMETRY_LEVEL_WARNING: logging.WARNING,
    TelemetryLevel.TELEMETRY_LEVEL_ERROR: logging.ERROR,
    TelemetryLevel.TELEMETRY_LEVEL_CRITICAL: logging.CRITICAL,
}
Detail = str | int | float
EventListener = Callable[[TelemetryPacket], None]
"""Gets the packet of an event, on the thread that tells it. It must not wait, raise, or tell an event itself."""

_listeners: list[EventListener] = []


def listen(listener: EventListener) -> Callable[[], None]:
    """Have a listener get every event of this process from now on, until the function that is returned is called."""
    _listeners.append(listener)

    def stop() -> None:
        with contextlib.suppress(ValueError):
            _listeners.remove(listener)

    return stop


def tell_event(
    source: str,
    name: str,
    level: TelemetryLevel.ValueType,
    *,
    reason: str,
    step_index: int | None = None,
    **details: Detail,
) -> TelemetryPacket:
    """Log an event, count it with its packet, and hand that to whoever listens; keep it off the step path.

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
    packet = hand_over(source, event)
    record_packets([packet])
    return packet


def hand_over(source: str, event: TelemetryEvent) -> TelemetryPacket:
    """Give an event to whoever listens, in a packet of its own, and neither log nor count it."""
    packet = TelemetryPacket(packet_id=event.event_id, source_subsystem=source, level=event.level, events=[event])
    packet.timestamp.GetCurrentTime()
    for listener in tuple(_listeners):
        listener(packet)
    return packet


def name_of(priority: MessagePriority.ValueType) -> str:
    """Return how operators read a priority: `HIGH`."""
    return MessagePriority.Name(priority).removeprefix("MESSAGE_PRIORITY_")
