from __future__ import annotations

from collections import deque
from typing import NamedTuple

from esper_rpc.proto.leyline.v1 import MessagePriority, TelemetryLevel
from esper_rpc.telemetry.events import PRIORITY_OF, tell_event

from .engine import Verdict
from .reading import PAUSE, PAUSE_AND_HOLD
from .signals.blueprint import BLUEPRINT_QUARANTINE
from .signals.degraded_inputs import DEGRADED_INPUTS
from .signals.isolation import ISOLATION_VIOLATIONS, KASMINA_BREAKER_OPEN
from .signals.latency import HOOK_BUDGET

SOURCE = "tamiyo"
MOSTLY_UNKNOWN = 0.5
"""The share of a step's metrics that may be unknown before somebody should look."""
_LEVELS = {
    BLUEPRINT_QUARANTINE: TelemetryLevel.TELEMETRY_LEVEL_CRITICAL,
    HOOK_BUDGET: TelemetryLevel.TELEMETRY_LEVEL_ERROR,
    ISOLATION_VIOLATIONS: TelemetryLevel.TELEMETRY_LEVEL_ERROR,
    KASMINA_BREAKER_OPEN: TelemetryLevel.TELEMETRY_LEVEL_ERROR,
}


class RiskEvent(NamedTuple):
    """A risk that a run has run into."""

    run_id: str
    step_index: int
    reason: str
    score: float
    level: TelemetryLevel.ValueType


class RiskEvents:
    """Events by the reason of the verdict, for each run and reason once in a while."""

    def __init__(self, quiet_steps: int) -> None:
        self._quiet_steps = quiet_steps
        self._unreported: deque[RiskEvent] = deque(maxlen=4096)

    def note(self, told: dict[str, int], *, run_id: str, step: int, step_index: int, verdict: Verdict) -> None:
        """Keep an event of this step for `report`; `told` is what the run was told of, by step."""
        reason = verdict.reason
        if not verdict.is_nominal and is_due(told, reason, step, self._quiet_steps):
            self._unreported.append(RiskEvent(run_id, step_index, reason, verdict.score, level_of(verdict)))

    def report(self) -> None:
        """Tell what was noted; keep it off the step path."""
        while self._unreported:
            event = self._unreported.popleft()
            tell_event(
                SOURCE,
                event.reason,
                event.level,
                reason=event.reason,
                step_index=event.step_index,
                run_id=event.run_id,
                risk_score=round(event.score, 4),
            )


def is_due(told: dict[str, int], reason: str, step: int, quiet_steps: int) -> bool:
    """Whether a run is to be told of something again; it counts as told then."""
    if step - told.get(reason, -quiet_steps) < quiet_steps:
        return False
    told[reason] = step
    return True


def level_of(verdict: Verdict) -> TelemetryLevel.ValueType:
    """Return the severity of the event of a verdict; from ERROR on somebody should look."""
    if verdict.is_nominal:
        return TelemetryLevel.TELEMETRY_LEVEL_INFO
    if verdict.demand == PAUSE_AND_HOLD:
        return TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
    severe = verdict.demand == PAUSE or (
        verdict.reason == DEGRADED_INPUTS and verdict.readings[DEGRADED_INPUTS].score > MOSTLY_UNKNOWN
    )
    usual = TelemetryLevel.TELEMETRY_LEVEL_ERROR if severe else TelemetryLevel.TELEMETRY_LEVEL_WARNING
    return _LEVELS.get(verdict.reason, usual)


def priority_of(verdict: Verdict) -> MessagePriority.ValueType:
    """Return the priority of the event of a verdict: HIGH and CRITICAL take the emergency lane."""
    return PRIORITY_OF[level_of(verdict)]
