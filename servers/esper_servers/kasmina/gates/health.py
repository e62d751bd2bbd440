"""What every gate asks first: the seed works, and is made of numbers."""

from __future__ import annotations

from esper_rpc.proto.kasmina.v1 import GateCheck
from esper_servers.blueprints.out_of_memory import OUT_OF_MEMORY
from esper_servers.kasmina.seed_slot import SeedSlot

from .report import FAILED, check

NOT_FINITE = "g1_gradient_health"
SEED_FAILED = "seed_failed"


def look(slot: SeedSlot) -> GateCheck:
    """Check that the seed has not failed, and that its weights are finite."""
    holds = not slot.has_failed() and slot.has_finite_weights()
    return check("health", FAILED, "" if holds else why_failed(slot), slot.site.failure, holds=holds)


def why_failed(slot: SeedSlot) -> str:
    """Name what is wrong with a seed that has failed."""
    if slot.site.failure.startswith(OUT_OF_MEMORY):
        return OUT_OF_MEMORY
    return SEED_FAILED if slot.site.failure else NOT_FINITE
