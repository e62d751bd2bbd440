"""Commands to a run that are not for its seeds: emergencies, and moves of the trainer's breakers."""

from __future__ import annotations

from collections.abc import Mapping

from esper_rpc.breaker import CircuitBreaker
from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CircuitState, EmergencyLevel, TelemetryLevel
from esper_rpc.verdict import APPLIED, MALFORMED, Verdict, failed, rejected

from .emergency.emergencies import OPERATOR, Emergencies
from .emergency.levels import NONE, Level
from .epoch_guard import BREAKER
from .telemetry import tell

LEVEL, TARGET = "emergency_level", "breaker"
"""The annotations that say what a command is about: no message has fields for them."""
COMMANDED = "commanded"
UNKNOWN_BREAKER = "unknown_breaker"
_LONGEST_REASON = 256
_LEVELS = {name.removeprefix("EMERGENCY_LEVEL_"): level for name, level in EmergencyLevel.items() if level != NONE}
_UNSPECIFIED = CircuitState.CIRCUIT_STATE_UNSPECIFIED


def raise_level(command: AdaptationCommand, emergencies: Emergencies, *, issuer: str) -> Verdict:
    """Raise the emergency level that a command names; it never lowers one, and a lower one is only told."""
    level = _level_of(command)
    if level is None:
        return rejected(MALFORMED)
    if not emergencies.obeys(level, issuer):
        return rejected(reasons.LOCAL_LIMIT)
    emergencies.alarm(level, _reason_of(command), origin=issuer, attributes={"command_id": command.command_id})
    return APPLIED


def move_breaker(command: AdaptationCommand, breakers: Mapping[str, CircuitBreaker], *, issuer: str) -> Verdict:
    """Move the breaker that a command names, by default the trainer's own. Only operators close one.

    What failed here opened it, and a mesh that lies could otherwise take that protection away.
    """
    wanted = command.circuit_breaker.desired_state
    if wanted == _UNSPECIFIED:
        return rejected(MALFORMED)
    name = command.annotations.get(TARGET) or BREAKER
    if name not in breakers:
        return failed(UNKNOWN_BREAKER)
    if wanted != CircuitState.CIRCUIT_STATE_OPEN and issuer != OPERATOR:
        return rejected(reasons.LOCAL_LIMIT)
    breakers[name].move_to(wanted)
    tell(
        "breaker_commanded", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason=COMMANDED, breaker=name,
        after=CircuitState.Name(wanted).removeprefix("CIRCUIT_STATE_"), issuer=issuer, command_id=command.command_id,
        rationale=command.circuit_breaker.rationale[:_LONGEST_REASON],
    )  # fmt: skip
    return APPLIED


def _level_of(command: AdaptationCommand) -> Level | None:
    """Return the level; None when there is none, or the command says more than that."""
    return None if command.WhichOneof("payload") else _LEVELS.get(command.annotations.get(LEVEL, ""))


def _reason_of(command: AdaptationCommand) -> str:
    return command.annotations.get("reason", "")[:_LONGEST_REASON] or COMMANDED
