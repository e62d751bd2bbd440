"""G5, before a seed is dormant again: nothing is left of what grew here."""

from __future__ import annotations

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate
from esper_servers.kasmina.seed_slot import SeedSlot

from .report import NOT_YET, check, report

GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G5_RESET
REASON = "g5_reset"


def judge(slot: SeedSlot, *, owned_parameters: int) -> GateEvent:
    """Judge a place that was cleared; what it still owns keeps it from being planted again."""
    site = slot.site
    is_empty = site.seed is None and slot.optimizer is None and not owned_parameters
    return report(
        GATE,
        [
            check("module", NOT_YET, REASON, f"{owned_parameters} parameters", holds=is_empty),
            check("alpha", NOT_YET, REASON, f"{site.alpha:g}", holds=not site.alpha and not site.paused),
            check("counters", NOT_YET, REASON, holds=slot.is_clean()),
        ],
    )
