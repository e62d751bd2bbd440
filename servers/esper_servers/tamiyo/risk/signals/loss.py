from __future__ import annotations

import math

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER, PAUSE, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

LOSS_NOT_FINITE = "loss_not_finite"
LOSS_SPIKE = "loss_spike"
LOSS_DRIFT = "loss_drift"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge the rise of the loss within the step."""
    if step.loss is None:
        return None
    if not math.isfinite(step.loss):
        return Reading(PAUSE, 1.0, LOSS_NOT_FINITE)
    if not step.loss_rise > config.spread * step.loss_deviation:
        return nominal()
    score = linear(step.loss_rise, 0.0, config.loss_spike)
    if step.loss_rise > config.loss_spike:
        return Reading(PAUSE, score, LOSS_SPIKE)
    if step.loss_rise > config.loss_spike / 2:
        return Reading(OPTIMIZER, score, LOSS_DRIFT)
    return nominal(score)
