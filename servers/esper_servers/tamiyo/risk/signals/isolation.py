from __future__ import annotations

from esper_rpc.proto.leyline.v1 import CircuitState
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import NO_SEED, Reading, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

ISOLATION_VIOLATIONS = "isolation_violations"
KASMINA_BREAKER_OPEN = "kasmina_breaker_open"


def read(step: StepSignals, _config: RiskConfig) -> Reading | None:
    """Judge what Kasmina tells of the walls between seeds and host: violations since the step before, its breaker."""
    violations = step.metric("kasmina.isolation.violations")
    of_seeds = [told for seed in step.seeds if (told := seed.metrics.get("isolation_violations")) is not None]
    breaker = step.metric("kasmina.breaker.state")
    if violations is None and breaker is None and not of_seeds:
        return None
    if (violations or 0.0) > 0 or any(told > 0 for told in of_seeds):
        return Reading(NO_SEED, 1.0, ISOLATION_VIOLATIONS)
    is_open = breaker == CircuitState.CIRCUIT_STATE_OPEN
    return Reading(NO_SEED, 1.0, KASMINA_BREAKER_OPEN) if is_open else nominal()
