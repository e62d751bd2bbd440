"""G4, before a seed becomes a fossil: the loss of the whole model is not worse than before the graft.

What a seed does to the model is asked in every step before that, too, see `patience`.
"""

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
        [health.look(slot), check("loss", FAILED, REASON, detail, holds=keeps_the_loss(slot, config, loss=loss))],
    )


def out_of_patience(reason: str, detail: str) -> GateEvent:
    """Tell of a seed that is taken out without having asked to move on."""
    return report(GATE, [check("patience", FAILED, reason, detail, holds=False)])


def keeps_the_loss(slot: SeedSlot, config: GateConfig, *, loss: float) -> bool:
    """Whether the loss is no worse than before the graft, as far as one is known."""
    before = slot.loss_at_graft
    # Written so that a loss that is not a number fails.
    return before is None or loss <= before + config.loss_tolerance * abs(before) + config.loss_margin
