"""What a seed must show before a forward move."""

from __future__ import annotations

from typing import NamedTuple

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage
from esper_servers.blueprints.out_of_memory import OUT_OF_MEMORY

from . import lifecycle
from .seed_slot import SeedSlot

NOT_FINITE = "g1_gradient_health"
ALPHA = "g2_stability"
IMPACT = "g4_system_impact"
SEED_FAILED = "seed_failed"
# The controller asks for the next stage at this alpha; float32 on the wire must not fall below it.
FULL_ALPHA = 0.98
# A tenth and a little, so that a loss near zero is not judged by its noise.
LOSS_TOLERANCE = 0.1
LOSS_MARGIN = 0.02


class Closed(NamedTuple):
    """A gate that does not let a seed pass."""

    reason: str
    has_failed: bool
    """The seed is to be culled; otherwise it only comes too early."""


def check(slot: SeedSlot, target: SeedLifecycleStage.ValueType, loss: float) -> Closed | None:
    """Return the gate that keeps a seed from a stage, None when it may move."""
    if target in (lifecycle.CULLED, slot.stage):
        return None
    if slot.has_failed() or not slot.has_finite_weights():
        return Closed(why_failed(slot), True)
    if target == lifecycle.BLENDING and not slot.updates and slot.optimizer is not None:
        return Closed(NOT_FINITE, False)
    if target == lifecycle.SHADOWING and slot.site.alpha < FULL_ALPHA:
        return Closed(ALPHA, False)
    if target == lifecycle.FOSSILIZED and not _keeps_the_loss(slot, loss):
        return Closed(IMPACT, True)
    return None


def why_failed(slot: SeedSlot) -> str:
    """Name what is wrong with a seed that has failed."""
    if slot.site.failure.startswith(OUT_OF_MEMORY):
        return OUT_OF_MEMORY
    return SEED_FAILED if slot.site.failure else NOT_FINITE


def _keeps_the_loss(slot: SeedSlot, loss: float) -> bool:
    before = slot.loss_at_graft
    # Written so that a loss that is not a number fails.
    return before is None or loss <= before + LOSS_TOLERANCE * abs(before) + LOSS_MARGIN
