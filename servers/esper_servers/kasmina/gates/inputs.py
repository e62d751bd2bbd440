"""What a command says of how much was known when it was decided; the same before every gate."""

from __future__ import annotations

from collections.abc import Mapping

from esper_rpc.proto.kasmina.v1 import GateEvent

from .report import NOT_YET, check, report

DEGRADED_INPUTS = "degraded_inputs"
ANNOTATION = "feature_coverage"


def look(gate: GateEvent, annotations: Mapping[str, str], least_coverage: float) -> GateEvent:
    """Add a check that enough was known, from 0 to 1, where the command tells; what is no number is too little."""
    told = annotations.get(ANNOTATION, "")
    if not told:
        return gate
    enough = check("inputs", NOT_YET, DEGRADED_INPUTS, f"coverage {told[:16]}", holds=_coverage(told) >= least_coverage)
    return report(gate.gate, [*gate.checks, enough])


def _coverage(told: str) -> float:
    try:
        return float(told)
    except ValueError:
        return -1.0
