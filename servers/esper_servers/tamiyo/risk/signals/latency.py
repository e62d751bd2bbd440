from __future__ import annotations

from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import NO_SEED, OPTIMIZER_FOR_SEED, PAUSE, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

STEP_LATENCY = "step_latency"
HOOK_BUDGET = "hook_budget"
APPLY_LATENCY = "apply_latency"
FINALIZE_LATENCY = "finalize_latency"


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge the time of the step at the trainer and of what the mesh does in it."""
    hook = step.metric("hook_latency_ms")
    rows = (
        (PAUSE, STEP_LATENCY, step.metric("step_latency_ms"), config.step_latency_ms),
        # A single slow hook is a hiccup of its machine.
        (PAUSE, HOOK_BUDGET, hook if step.slow_hooks >= config.slow_hooks else None, config.hook_latency_ms),
        (OPTIMIZER_FOR_SEED, APPLY_LATENCY, step.metric("kasmina.apply_ms"), config.apply_ms),
        (OPTIMIZER_FOR_SEED, FINALIZE_LATENCY, step.metric("kasmina.finalize_ms"), config.finalize_ms),
        (NO_SEED, HOOK_BUDGET, hook, config.hook_latency_ms),
    )
    known = [row for row in rows if row[2] is not None]
    if not known:
        return None
    score = linear(max(row[2] or 0.0 for row in known), config.latency_base_ms, config.latency_emergency_ms)
    for demand, reason, value, limit in known:
        if value is not None and value > limit:
            return Reading(demand, score, reason)
    return nominal(score)
