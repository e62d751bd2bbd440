from __future__ import annotations

import math

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.tamiyo.risk.config import RiskConfig
from esper_servers.tamiyo.risk.reading import NO_SEED, Reading, linear, nominal
from esper_servers.tamiyo.risk.step_signals import StepSignals

SEED_DIVERGES = "seed_diverges"
SEED_RISK = "seed_risk"
SEEDS_UNSETTLED = "seeds_unsettled"
UNSETTLED = frozenset({
    Stage.SEED_LIFECYCLE_STAGE_CULLED, Stage.SEED_LIFECYCLE_STAGE_EMBARGOED, Stage.SEED_LIFECYCLE_STAGE_RESETTING,
})  # fmt: skip


def read(step: StepSignals, config: RiskConfig) -> Reading | None:
    """Judge the seeds: their own gradients and risk, and how many recover from a failure."""
    if not step.seeds:
        return None
    risk, unsettled = 0.0, 0
    for seed in step.seeds:  # One pass: there may be 256.
        if not math.isfinite(seed.gradient_norm):  # 0 where it is absent.
            return Reading(NO_SEED, 1.0, SEED_DIVERGES)
        risk = max(risk, seed.risk_score)
        unsettled += seed.stage in UNSETTLED
    share = unsettled / len(step.seeds)
    score = linear(max(risk, share), 0.0, 1.0)
    if risk > config.seed_risk:
        return Reading(NO_SEED, score, SEED_RISK)
    return Reading(NO_SEED, score, SEEDS_UNSETTLED) if share > config.unsettled_seeds else nominal(score)
