from __future__ import annotations

from esper_rpc.proto.kasmina.v1 import RollbackPayload
from esper_rpc.proto.leyline.v1 import SeedLifecycleGate

from .seed_slot import SeedSlot

NO_GATE = SeedLifecycleGate.SEED_LIFECYCLE_GATE_UNSPECIFIED


class RollbackPayloads:
    """What a ROLLBACK command carries to go back to before a seed that was taken out; the last one of each seed."""

    def __init__(self) -> None:
        self._of: dict[str, RollbackPayload] = {}

    def record(
        self, slot: SeedSlot, *, reason: str, step: int, gate: SeedLifecycleGate.ValueType = NO_GATE
    ) -> RollbackPayload:
        """Note a seed that is about to be taken out."""
        found = RollbackPayload(
            seed_id=slot.seed_id, blueprint_id=slot.blueprint_id, reason=reason, stage=slot.stage, gate=gate,
            global_step=step,
        )  # fmt: skip
        if slot.has_touched_the_output:
            found.payload.update({"step": slot.grafted_at, "reason": reason, "tier": "fast"})
        self._of[slot.seed_id] = found
        return found

    def of(self, seed_id: str) -> RollbackPayload | None:
        """Return the last one of a seed."""
        return self._of.get(seed_id)

    def clear(self) -> None:
        """Forget all: the training went back, and what they tell of has not happened."""
        self._of.clear()
