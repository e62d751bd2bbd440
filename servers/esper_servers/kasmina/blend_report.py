from __future__ import annotations

import structlog

from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import Detail

from .events import SeedEvents
from .seed_slot import SeedSlot

log = structlog.get_logger(__name__)

INVALID_BLEND_CONFIG = "invalid_blend_config"


def report_blend(events: SeedEvents, slot: SeedSlot, problem: str) -> None:
    """Tell how a seed is blended from here on; `problem` is why not as its command asked."""
    blend = slot.blend
    details: dict[str, Detail] = {"mode": blend.mode, "source": blend.source, "alpha_vec_len": len(blend.alpha_vec)}
    if problem:
        log.warning("fallback_applied", seed_id=slot.seed_id, reason=INVALID_BLEND_CONFIG, problem=problem)
        events.tell(
            "fallback_applied", TelemetryLevel.TELEMETRY_LEVEL_WARNING, reason=INVALID_BLEND_CONFIG,
            seed_id=slot.seed_id, problem=problem, **details,
        )  # fmt: skip
    events.tell(
        "blend_config", TelemetryLevel.TELEMETRY_LEVEL_INFO, reason="commanded", seed_id=slot.seed_id, **details
    )
