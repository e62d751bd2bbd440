from __future__ import annotations

import math

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import NO_SEED, OPTIMIZER_FOR_SEED, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

GRADIENT_NOT_FINITE = "gradient_not_finite"
GRADIENT_NORM = "gradient_norm"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge the size of the host's gradient."""
    norm = step.metrics.get("gradient_norm")
    if norm is None:
        return None
    if not math.isfinite(norm):
        # No pause: a loss scaler that looks for its scale overflows now and then.
        return Reading(NO_SEED, 1.0, GRADIENT_NOT_FINITE)
    score = linear(norm, config.gradient_base, config.gradient_emergency)
    return Reading(OPTIMIZER_FOR_SEED, score, GRADIENT_NORM) if norm > config.gradient_warning else nominal(score)
