from __future__ import annotations

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import NO_SEED, Reading, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

DEGRADED_INPUTS = "degraded_inputs"
BESIDE_THE_LOSS = ("gradient_norm", "samples_per_s", "hook_latency_ms")


def read(step: StepSignals, config: RiskConfig) -> Reading:
    """Judge how many of the four metrics of a step are known; without the loss nothing else says much."""
    known = (step.loss is not None) + sum(step.metric(name) is not None for name in BESIDE_THE_LOSS)
    share = known / (1 + len(BESIDE_THE_LOSS))
    degraded = step.loss is None or share < config.coverage
    return Reading(NO_SEED, 1.0 - share, DEGRADED_INPUTS) if degraded else nominal(1.0 - share)
