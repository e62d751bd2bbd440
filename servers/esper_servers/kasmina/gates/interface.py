"""G3, before probation: the seed fits its place, is seen from outside, and can be held and let go."""

from __future__ import annotations

from collections.abc import Sequence

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate
from esper_servers.kasmina.seed_slot import SeedSlot
from esper_servers.kasmina.trial import trial

from . import health
from .report import FAILED, NOT_YET, check, report

GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G3_INTERFACE
REASON = "g3_interface"


def judge(slot: SeedSlot, *, untold: Sequence[str]) -> GateEvent:
    """Judge a seed at full alpha; `untold` are the metrics that its last packet lacked."""
    missing = ", ".join(untold)
    misfit = why_it_does_not_fit(slot)
    return report(
        GATE,
        [
            health.look(slot),
            check("shapes", FAILED, misfit, str(tuple(slot.site.output_shape)), holds=not misfit),
            check("telemetry", NOT_YET, REASON, missing, holds=not missing),
            check("pause_resume", FAILED, REASON, holds=not misfit and slot.site.can_be_held()),
        ],
    )


def why_it_does_not_fit(slot: SeedSlot) -> str:
    """Try the seed on a map of its host's shape; why it cannot serve there, empty when it can."""
    if slot.site.seed is None:
        return REASON
    try:
        return trial(slot.site.seed, slot.site)
    except Exception:  # noqa: BLE001  # A seed is foreign code; whatever it raises, it does not take part.
        return health.SEED_FAILED
