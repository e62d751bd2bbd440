"""G0, before germination: the request is valid, its parameters are in bounds, the blueprint is to be had."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import (
    BlueprintDescriptor,
    BlueprintParameterBounds,
    CommandSeedOperation,
    SeedLifecycleGate,
)

from .report import FAILED, check, report

GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G0_SANITY
REASON = "g0_sanity"
OUT_OF_BOUNDS = "parameter_out_of_bounds"
QUARANTINED = "bp_quarantine"


def judge(operation: CommandSeedOperation, blueprint: BlueprintDescriptor | None, why_unavailable: str) -> GateEvent:
    """Judge what a germination asks for; without a blueprint, `why_unavailable` says why there is none."""
    bounds = blueprint.allowed_parameters if blueprint is not None else {}
    wrong = ", ".join(_out_of_bounds(operation.parameters, bounds))
    is_quarantined = blueprint is not None and blueprint.quarantine_only
    return report(
        GATE,
        [
            check("request", FAILED, REASON, holds=bool(operation.blueprint_id)),
            check("parameters", FAILED, OUT_OF_BOUNDS, wrong, holds=not wrong),
            check("available", FAILED, why_unavailable, operation.blueprint_id, holds=not why_unavailable),
            check("quarantine", FAILED, QUARANTINED, operation.blueprint_id, holds=not is_quarantined),
        ],
    )


def _out_of_bounds(given: Mapping[str, float], bounds: Mapping[str, BlueprintParameterBounds]) -> Iterator[str]:
    for name, value in sorted(given.items()):
        allowed = bounds.get(name)
        is_within = allowed is None or allowed.min_value <= value <= allowed.max_value
        if not (math.isfinite(value) and is_within):
            yield f"{name} = {value:g}"
