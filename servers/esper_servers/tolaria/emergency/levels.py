"""What each level of an emergency means for a run, and how the design of Tolaria calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from esper_rpc.proto.leyline.v1 import EmergencyLevel, TelemetryLevel

Level: TypeAlias = EmergencyLevel.ValueType
NONE: Level = EmergencyLevel.EMERGENCY_LEVEL_UNSPECIFIED
NOTICE: Level = EmergencyLevel.EMERGENCY_LEVEL_NOTICE
ELEVATED: Level = EmergencyLevel.EMERGENCY_LEVEL_ELEVATED
CONSERVATIVE: Level = EmergencyLevel.EMERGENCY_LEVEL_CONSERVATIVE
HALT: Level = EmergencyLevel.EMERGENCY_LEVEL_HALT


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """How a run answers a level."""

    design_name: str
    within_ms: int
    """When the answer has begun at the latest."""
    event: TelemetryLevel.ValueType
    is_conservative: bool = False
    halts: bool = False


RESPONSES: Mapping[Level, Response] = {
    NOTICE: Response(design_name="MINOR", within_ms=5000, event=TelemetryLevel.TELEMETRY_LEVEL_INFO),
    ELEVATED: Response(
        design_name="MAJOR",
        within_ms=2000,
        event=TelemetryLevel.TELEMETRY_LEVEL_WARNING,
    ),
    CONSERVATIVE: Response(
        design_name="SEVERE",
        within_ms=500,
        event=TelemetryLevel.TELEMETRY_LEVEL_ERROR,
        is_conservative=True,
    ),
    HALT: Response(
        design_name="CRITICAL",
        within_ms=100,
        event=TelemetryLevel.TELEMETRY_LEVEL_CRITICAL,
        is_conservative=True,
        halts=True,
    ),
}
PUBLISHED_FROM: Level = CONSERVATIVE
"""From this level on the events of an emergency have the priorities of the emergency lane."""


def name_of(level: Level) -> str:
    """Return how operators read a level: `HALT`, or `NONE`."""
    return EmergencyLevel.Name(level).removeprefix("EMERGENCY_LEVEL_") if level else "NONE"
