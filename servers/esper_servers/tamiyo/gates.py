"""Gates that overrule the policy, most severe first (requirements 2.6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from esper_rpc.config import Range, validate
from esper_servers.policy import schema

LOSS_SPIKE = "loss_spike"
LOSS_DRIFT = "loss_drift"
LOSS_NOT_FINITE = "loss_not_finite"
HOOK_BUDGET = "hook_budget"
CONSERVATIVE = "conservative_mode"
PAUSE_COOL_DOWN_STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Thresholds."""

    loss_spike: Annotated[float, Range(0, 1000)] = 0.15
    """Rise of the loss within one step, beyond its usual spread."""
    spread: Annotated[float, Range(0, 100)] = 4.0
    """A rise counts only beyond this many standard deviations: small batches are noisy."""
    hook_latency_ms: Annotated[float, Range(1, 60_000)] = 50.0

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which kinds of action remain, and why fewer than all."""

    allowed: tuple[bool, bool, bool, bool]
    forced: int | None
    reason: str


OPEN = Verdict((True, True, True, True), None, "")
_NO_SEED = (True, False, True, True)
_NOTHING = (True, False, False, False)


def judge(
    *, loss: float, delta: float, deviation: float, hook_latency_ms: float, conservative: bool, config: GateConfig
) -> Verdict:
    """Judge one step. `delta` is the rise of the loss, `deviation` its standard deviation before this step."""
    if not math.isfinite(loss):
        return Verdict(_NO_SEED, schema.KIND_PAUSE, LOSS_NOT_FINITE)
    unusual = delta > config.spread * deviation
    if unusual and delta > config.loss_spike:
        return Verdict(_NO_SEED, schema.KIND_PAUSE, LOSS_SPIKE)
    if conservative:
        return Verdict(_NOTHING, None, CONSERVATIVE)
    if unusual and delta > config.loss_spike / 2:
        return Verdict(_NO_SEED, schema.KIND_OPTIMIZER, LOSS_DRIFT)
    if hook_latency_ms > config.hook_latency_ms:
        return Verdict(_NO_SEED, None, HOOK_BUDGET)
    return OPEN
