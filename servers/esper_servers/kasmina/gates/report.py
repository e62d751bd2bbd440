"""How checks and gates are told: as messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence

from esper_rpc.proto.kasmina.v1 import GateCheck, GateEvent, GateResult
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate

PASSED, NOT_YET, FAILED = (
    GateResult.GATE_RESULT_PASSED,
    GateResult.GATE_RESULT_NOT_YET,
    GateResult.GATE_RESULT_FAILED,
)


def check(name: str, otherwise: GateResult.ValueType, reason: str, detail: str = "", *, holds: bool) -> GateCheck:
    """Tell of a check that passed if it holds, and what follows otherwise."""
    if holds:
        return GateCheck(name=name, result=PASSED, detail=detail)
    return GateCheck(name=name, result=otherwise, reason=reason, detail=detail)


def report(gate: SeedLifecycleGate.ValueType, checks: Sequence[GateCheck]) -> GateEvent:
    """Sum up the checks of a gate; the worst decides, and among equals the first."""
    worst = max(checks, key=lambda each: each.result)
    return GateEvent(gate=gate, result=worst.result, reason=worst.reason, checks=checks)
