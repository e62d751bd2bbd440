from __future__ import annotations

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER_FOR_SEED, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

LOSS_VOLATILITY = "loss_volatility"
LOSS_VARIANCE = "loss_variance"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge how far the loss scatters, by its moving variance and by what the trainer tells."""
    if step.loss is None:
        return None
    score = linear(step.loss_variance, config.loss_variance_base, config.loss_variance_emergency)
    if step.loss_variance > config.loss_variance_warning:
        return Reading(OPTIMIZER_FOR_SEED, score, LOSS_VARIANCE)
    if (step.metric("loss_volatility") or 0.0) > config.loss_volatility:
        return Reading(OPTIMIZER_FOR_SEED, score, LOSS_VOLATILITY)
    return nominal(score)
