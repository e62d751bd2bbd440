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
    breaker = step.metric("kasmina.breaker.state")
    if violations is None and breaker is None:
        return None
    if violations is not None and violations > 0:
        return Reading(NO_SEED, 1.0, ISOLATION_VIOLATIONS)
    is_open = breaker == CircuitState.CIRCUIT_STATE_OPEN
    return Reading(NO_SEED, 1.0, KASMINA_BREAKER_OPEN) if is_open else nominal()
