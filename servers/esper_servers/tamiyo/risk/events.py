from __future__ import annotations

from collections import deque
from typing import NamedTuple

import structlog

from esper_rpc.proto.leyline.v1 import MessagePriority

from .engine import Verdict
from .reading import PAUSE, PAUSE_AND_HOLD
from .signals.blueprint import BLUEPRINT_QUARANTINE
from .signals.isolation import ISOLATION_VIOLATIONS, KASMINA_BREAKER_OPEN
from .signals.latency import HOOK_BUDGET

log = structlog.get_logger(__name__)

_PRIORITIES = {
    BLUEPRINT_QUARANTINE: MessagePriority.MESSAGE_PRIORITY_CRITICAL,
    HOOK_BUDGET: MessagePriority.MESSAGE_PRIORITY_HIGH,
    ISOLATION_VIOLATIONS: MessagePriority.MESSAGE_PRIORITY_HIGH,
    KASMINA_BREAKER_OPEN: MessagePriority.MESSAGE_PRIORITY_HIGH,
}


class RiskEvent(NamedTuple):
    """A risk that a run has run into."""

    run_id: str
    step: int
    reason: str
    score: float
    priority: MessagePriority.ValueType


class RiskEvents:
    """Events by the reason of the verdict, for each run and reason once in a while."""

    def __init__(self, quiet_steps: int) -> None:
        self._quiet_steps = quiet_steps
        self._unreported: deque[RiskEvent] = deque(maxlen=4096)

    def note(self, told: dict[str, int], *, run_id: str, step: int, verdict: Verdict) -> None:
        """Keep an event of this step for `report`; `told` is what the run was told of, by step."""
        reason = verdict.reason
        if verdict.is_nominal or step - told.get(reason, -self._quiet_steps) < self._quiet_steps:
            return
        told[reason] = step
        self._unreported.append(RiskEvent(run_id, step, reason, verdict.score, priority_of(verdict)))

    def report(self) -> None:
        """Log what was noted; keep it off the step path."""
        while self._unreported:
            event = self._unreported.popleft()
            critical = event.priority == MessagePriority.MESSAGE_PRIORITY_CRITICAL
            (log.critical if critical else log.warning)(
                event.reason,
                run_id=event.run_id,
                step=event.step,
                risk_score=round(event.score, 4),
                priority=MessagePriority.Name(event.priority).removeprefix("MESSAGE_PRIORITY_"),
            )


def priority_of(verdict: Verdict) -> MessagePriority.ValueType:
    """Return the priority of the event of a verdict; from HIGH on somebody should look."""
    if verdict.demand == PAUSE_AND_HOLD:
        return MessagePriority.MESSAGE_PRIORITY_CRITICAL
    usual = (
        MessagePriority.MESSAGE_PRIORITY_HIGH if verdict.demand == PAUSE else MessagePriority.MESSAGE_PRIORITY_NORMAL
    )
    return _PRIORITIES.get(verdict.reason, usual)
