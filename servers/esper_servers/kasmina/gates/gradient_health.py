"""G1, before blending: the loss is a number, gradients are healthy, nothing was written that is not the seed's."""

from __future__ import annotations

import math

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate
from esper_servers.kasmina.seed_slot import SeedSlot

from . import health
from .report import FAILED, NOT_YET, check, report

GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G1_GRADIENT_HEALTH
REASON = health.NOT_FINITE


def judge(slot: SeedSlot, *, loss: float, violations: int, is_measured: bool) -> GateEvent:
    """Judge a seed that has trained beside its host.

    `violations` are writes to what is not its own, and gradients that overlap with the host's; `is_measured` tells
    whether the hooks that look for these have worked.
    """
    norm = slot.gradient_norm
    has_learned = slot.updates > 0 or slot.optimizer is None
    return report(
        GATE,
        [
            health.look(slot),
            # The loss is the model's: what is wrong with it now need not be the seed's doing.
            check("loss", NOT_YET, REASON, f"{loss:g}", holds=math.isfinite(loss)),
            check("learned", NOT_YET, REASON, f"{slot.updates} updates", holds=has_learned),
            check("gradients", NOT_YET, REASON, f"norm {norm}", holds=not slot.violations),
            check("hooks", NOT_YET, REASON, holds=is_measured),
            check("isolation", FAILED, REASON, f"{violations} violations", holds=not violations),
        ],
    )
