"""What the controller of learning rates tells: changes by others, and its breaker."""

from __future__ import annotations

from typing import Any

from esper_rpc.proto.leyline.v1 import CircuitState, TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import LEARNING_RATE_VIOLATIONS, observe_breaker_move

from . import rates

SOURCE = "tolaria"
BREAKER = "learning_rate"
OUTSIDE_CHANGE, SCHEDULER_ATTACHED = "outside_change", "scheduler_attached"


def violation(index: int, group: dict[str, Any], *, expected: float, is_loud: bool) -> None:
    """Count a rate that somebody else changed; tell it while that is news."""
    reason = SCHEDULER_ATTACHED if "initial_lr" in group else OUTSIDE_CHANGE
    LEARNING_RATE_VIOLATIONS.labels(reason).inc()
    if is_loud:
        tell_event(
            SOURCE, "learning_rate_violation", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason=reason, group=index,
            expected=expected, found=rates.read(group),
        )  # fmt: skip


def group_found(rate: float) -> None:
    """Tell that the optimizer has a group which nobody announced."""
    tell_event(
        SOURCE, "learning_rate_group_found", TelemetryLevel.TELEMETRY_LEVEL_INFO, reason="outside_change", rate=rate
    )


def breaker_moved(before: CircuitState.ValueType, after: CircuitState.ValueType) -> None:
    """Tell a move of the breaker."""
    name = _named(after).lower()
    observe_breaker_move(BREAKER, name)
    is_open = after == CircuitState.CIRCUIT_STATE_OPEN
    level = TelemetryLevel.TELEMETRY_LEVEL_ERROR if is_open else TelemetryLevel.TELEMETRY_LEVEL_INFO
    tell_event(
        SOURCE, "breaker_moved", level, reason=f"{BREAKER}_breaker_{name}", breaker=BREAKER, before=_named(before),
        after=_named(after),
    )  # fmt: skip


def _named(state: CircuitState.ValueType) -> str:
    return CircuitState.Name(state).removeprefix("CIRCUIT_STATE_")
