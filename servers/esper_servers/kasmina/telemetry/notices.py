from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter
from typing import Protocol

import structlog

from esper_rpc.proto.leyline.v1 import TelemetryEvent, TelemetryLevel
from esper_rpc.telemetry.events import PRIORITY_OF, hand_over, name_of

log = structlog.get_logger(__name__)

TOLD_EACH = 64
LONGEST_DETAIL = 256
INFO = TelemetryLevel.TELEMETRY_LEVEL_INFO
WARNING = TelemetryLevel.TELEMETRY_LEVEL_WARNING
ERROR = TelemetryLevel.TELEMETRY_LEVEL_ERROR
CRITICAL = TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
SOURCE = "kasmina"
_LOG_LEVEL = {WARNING: logging.WARNING, ERROR: logging.ERROR, CRITICAL: logging.CRITICAL}


class Tell(Protocol):
    """Tells of something that happened."""

    def __call__(self, name: str, level: TelemetryLevel.ValueType, *, reason: str, **details: str | float) -> None: ...


def tell_nobody(name: str, level: TelemetryLevel.ValueType, *, reason: str, **details: str | float) -> None:
    """Tell nothing: what is used alone, outside a host."""


class Notices:
    """What happened since the last step, as events for its global packet; what is not in order is logged at once.

    What is CRITICAL is given at once to whoever listens to this process, too. The first ones of a step are told each,
    the rest as a number by name. Safe to use from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: list[TelemetryEvent] = []
        self._rest: Counter[str] = Counter()

    def tell(self, name: str, level: TelemetryLevel.ValueType, *, reason: str, **details: str | float) -> None:
        """Keep an event until the end of the step."""
        known = {"reason": reason, "priority": name_of(PRIORITY_OF[level]), **details}
        if level in _LOG_LEVEL:
            log.log(_LOG_LEVEL[level], name, **known)
        attributes = {key: str(value)[:LONGEST_DETAIL] for key, value in known.items()}
        event = TelemetryEvent(event_id=str(uuid.uuid4()), description=name, level=level, attributes=attributes)
        if level == CRITICAL:
            hand_over(SOURCE, event)
        with self._lock:
            if len(self._first) < TOLD_EACH:
                self._first.append(event)
            else:
                self._rest[name] += 1

    def take(self, step_index: int) -> list[TelemetryEvent]:
        """Return what was told since the last call."""
        with self._lock:
            events, rest = self._first, self._rest
            self._first, self._rest = [], Counter()
        events += [_uncounted(name, count) for name, count in rest.items()]
        for event in events:
            event.attributes["step_index"] = str(step_index)
        return events


def _uncounted(name: str, count: int) -> TelemetryEvent:
    attributes = {"count": str(count), "reason": "too_many"}
    return TelemetryEvent(event_id=str(uuid.uuid4()), description=name, level=WARNING, attributes=attributes)
