from __future__ import annotations

from esper_rpc.proto.leyline.v1 import HandlingClass, HazardBand
from esper_servers.policy.graph import BlueprintCandidate
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER_FOR_SEED, PAUSE, PAUSE_AND_HOLD, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

BLUEPRINT_QUARANTINE = "bp_quarantine"
HAZARD_CRITICAL = "bsds_hazard_critical"
HAZARD_HIGH = "bsds_hazard_high"
HANDLING_QUARANTINE = "bsds_quarantine"


def read(step: StepSignals, _config: RiskConfig) -> Reading | None:
    """Judge the blueprints that live in the run's seeds by their safety data sheets and the catalogue."""
    if not step.grown:
        return None
    return max(map(_judge, step.grown))


def _judge(blueprint: BlueprintCandidate) -> Reading:
    if blueprint.hazard_band == HazardBand.HAZARD_BAND_CRITICAL:
        return Reading(PAUSE_AND_HOLD, 1.0, HAZARD_CRITICAL)
    if blueprint.handling_class == HandlingClass.HANDLING_CLASS_QUARANTINE:
        return Reading(PAUSE_AND_HOLD, 1.0, HANDLING_QUARANTINE)
    if blueprint.descriptor.quarantine_only:
        return Reading(PAUSE, 1.0, BLUEPRINT_QUARANTINE)
    risk = linear(blueprint.risk, 0.0, 1.0)
    if blueprint.hazard_band == HazardBand.HAZARD_BAND_HIGH:
        return Reading(OPTIMIZER_FOR_SEED, risk, HAZARD_HIGH)
    return nominal(risk)
