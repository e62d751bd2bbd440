from __future__ import annotations

import uuid

import structlog

from esper_rpc.proto.leyline.v1 import TelemetryEvent, TelemetryLevel
from esper_rpc.telemetry.events import PRIORITY_OF, name_of

from .seed_slot import SeedSlot

log = structlog.get_logger(__name__)

INVALID_BLEND_CONFIG = "invalid_blend_config"


class BlendEvents:
    """How seeds were begun to be blended since the last step, as events for its packets."""

    def __init__(self) -> None:
        self._events: list[TelemetryEvent] = []

    def note(self, slot: SeedSlot, problem: str) -> None:
        """Tell how a seed is blended from here on; `problem` is why not as its command asked."""
        details = {
            "seed_id": slot.seed_id,
            "mode": slot.blend.mode,
            "source": slot.blend.source,
            "alpha_vec_len": str(len(slot.blend.alpha_vec)),
        }
        if problem:
            log.warning("fallback_applied", reason=INVALID_BLEND_CONFIG, problem=problem, **details)
            level = TelemetryLevel.TELEMETRY_LEVEL_WARNING
            self._add("fallback_applied", level, INVALID_BLEND_CONFIG, {**details, "problem": problem})
        self._add("blend_config", TelemetryLevel.TELEMETRY_LEVEL_INFO, "commanded", details)

    def take(self, step_index: int) -> list[TelemetryEvent]:
        """Return what was noted since the last call."""
        events, self._events = self._events, []
        for event in events:
            event.attributes["step_index"] = str(step_index)
        return events

    def _add(self, name: str, level: TelemetryLevel.ValueType, reason: str, details: dict[str, str]) -> None:
        indicators = {"reason": reason, "priority": name_of(PRIORITY_OF[level])}
        self._events.append(
            TelemetryEvent(
                event_id=str(uuid.uuid4()), description=name, level=level, attributes={**indicators, **details}
            )
        )
