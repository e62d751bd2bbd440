"""G4, before a seed becomes a fossil: the loss of the whole model is not worse than before the graft."""

from __future__ import annotations

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate
from esper_servers.kasmina.seed_slot import SeedSlot

from . import health
from .config import GateConfig
from .report import FAILED, check, report

GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G4_SYSTEM_IMPACT
REASON = "g4_system_impact"


def judge(slot: SeedSlot, config: GateConfig, *, loss: float) -> GateEvent:
    """Judge what the seed does to the loss; without one before the graft there is nothing to hold against it."""
    before = slot.loss_at_graft
    detail = f"{loss:g}, before the graft {before:g}" if before is not None else f"{loss:g}"
    return report(
        GATE,
        [health.look(slot), check("loss", FAILED, REASON, detail, holds=_keeps_the_loss(before, loss, config))],
    )


def _keeps_the_loss(before: float | None, loss: float, config: GateConfig) -> bool:
    # Written so that a loss that is not a number fails.
    return before is None or loss <= before + config.loss_tolerance * abs(before) + config.loss_margin
