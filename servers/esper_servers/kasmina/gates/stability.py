"""G2, before shadowing: alpha has run its course, outputs are steady, and the forward pass has its time."""

from __future__ import annotations

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate
from esper_servers.kasmina.seed_slot import SeedSlot

from . import health
from .config import GateConfig
from .report import NOT_YET, check, report

GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_G2_STABILITY
REASON = "g2_stability"
# The controller asks for the next stage at this alpha; float32 on the wire must not fall below it.
FULL_ALPHA = 0.98


def judge(slot: SeedSlot, config: GateConfig) -> GateEvent:
    """Judge a seed that is blended in."""
    steadiness, alpha = slot.steadiness, slot.site.alpha
    drift, hook_ms = steadiness.drift(), steadiness.hook_ms
    return report(
        GATE,
        [
            health.look(slot),
            check("alpha", NOT_YET, REASON, f"{alpha:g}", holds=alpha >= FULL_ALPHA),
            check("outputs", NOT_YET, REASON, f"drift {drift:g}", holds=drift <= config.output_drift),
            check("oscillation", NOT_YET, REASON, holds=not steadiness.swings(config.output_drift)),
            check("hook_latency", NOT_YET, REASON, f"{hook_ms:.3g} ms", holds=hook_ms <= config.hook_ms),
        ],
    )
