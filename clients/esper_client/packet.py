from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence

from esper_rpc.proto.leyline.v1 import SeedState, SystemStatePacket

SCHEMA_VERSION = 1


def build_packet(
    *,
    run_id: str,
    epoch: int,
    global_step: int,
    loss: float,
    metrics: Mapping[str, float],
    seeds: Sequence[SeedState],
) -> SystemStatePacket:
    """Build the state of one step. `metrics`: gradient_norm, samples_per_s, hook_latency_ms and what else is known."""
    return SystemStatePacket(
        version=SCHEMA_VERSION,
        current_epoch=epoch,
        timestamp_ns=time.time_ns(),
        training_metrics={"loss": loss, **metrics},
        seed_states=seeds,
        packet_id=uuid.uuid4().hex,
        global_step=global_step,
        training_loss=loss,
        source_subsystem="tolaria",
        training_run_id=run_id,
    )
