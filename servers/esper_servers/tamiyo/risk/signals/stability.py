from __future__ import annotations

import math

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER_FOR_SEED, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

UNSTABLE = "unstable"
LOSS_SHARE, GRADIENT_SHARE, PROGRESS_SHARE = 0.5, 0.3, 0.2


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge loss, gradient and progress together: each may pass by itself and all of them be poor."""
    if step.loss is None or not math.isfinite(step.loss):
        return None
    unrest = LOSS_SHARE * linear(step.loss_variance, config.loss_variance_base, config.loss_variance_emergency)
    unrest += PROGRESS_SHARE * linear(-step.loss_trend, 0.0, config.loss_spike)
    known = LOSS_SHARE + PROGRESS_SHARE
    if step.gradient_volatility is not None:
        unrest += GRADIENT_SHARE * linear(step.gradient_volatility, 0.0, 2 * config.gradient_volatility)
        known += GRADIENT_SHARE
    score = unrest / known
    return Reading(OPTIMIZER_FOR_SEED, score, UNSTABLE) if 1.0 - score < config.stability else nominal(score)
