from __future__ import annotations

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import OPTIMIZER_FOR_SEED, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

GRADIENT_VOLATILITY = "gradient_volatility"
GRADIENT_VARIANCE = "gradient_variance"
GRADIENT_CONFLICT = "gradient_conflict"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge how far the gradient scatters, and how often seed and host pull against each other."""
    rows = (
        (GRADIENT_VOLATILITY, step.gradient_volatility, config.gradient_volatility),
        (GRADIENT_VARIANCE, step.metric("grad_var"), config.gradient_variance),
        (GRADIENT_CONFLICT, step.metric("grad_conflict_rate"), config.gradient_conflict_rate),
    )
    known = [(reason, value, limit) for reason, value, limit in rows if value is not None]
    if not known:
        return None
    score = max(linear(value, 0.0, limit) for _, value, limit in known)
    exceeded = next((reason for reason, value, limit in known if value > limit), "")
    return Reading(OPTIMIZER_FOR_SEED, score, exceeded) if exceeded else nominal(score)
