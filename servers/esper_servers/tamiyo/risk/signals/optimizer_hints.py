from __future__ import annotations

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

LEARNING_RATE_VANISHED = "learning_rate_vanished"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge a learning rate that can no longer turn a rising loss."""
    rate = step.metric("optimizer_lr")
    if rate is None or rate < 0:
        return None
    told = step.metric("loss_delta")
    rise = step.loss_rise if told is None else told
    if rate < config.learning_rate and rise > 0:
        return Reading(OPTIMIZER, linear(rise, 0.0, config.loss_spike), LEARNING_RATE_VANISHED)
    return nominal()
