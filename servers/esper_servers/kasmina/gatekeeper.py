from __future__ import annotations

from esper_rpc.proto.kasmina.v1 import GateEvent
from esper_rpc.proto.leyline.v1 import AdaptationCommand, SeedLifecycleStage

from . import lifecycle
from .boundary import Boundary
from .gates import gradient_health, inputs, interface, reset, sanity, stability, system_impact
from .gates.config import GateConfig
from .kernels.library import UNAVAILABLE, UNKNOWN_BLUEPRINT, Kernel
from .progress import Progress
from .seed_slot import SeedSlot
from .telemetry import step_packets
from .telemetry.events import SeedEvents

KERNEL_LATE = "kernel_late"
NOT_TO_BE_HAD = frozenset({UNKNOWN_BLUEPRINT, UNAVAILABLE, KERNEL_LATE})


class Gatekeeper:
    """Asks the gate that stands before a stage, and has told what it found."""

    def __init__(
        self,
        *,
        config: GateConfig,
        boundary: Boundary,
        progress: Progress,
        events: SeedEvents,
    ) -> None:
        self.config = config
        self._boundary = boundary
        self._progress = progress
        self._events = events

    def look_at(self, command: AdaptationCommand, kernel: Kernel | str) -> GateEvent:
        """Ask G0, and tell nobody yet; without a kernel there is the reason why."""
        descriptor = kernel.blueprint.descriptor if isinstance(kernel, Kernel) else None
        # What came and cannot be used is a failure to load, after germination.
        why_not = kernel if isinstance(kernel, str) and kernel in NOT_TO_BE_HAD else ""
        gate = sanity.judge(command.seed_operation, descriptor, why_not)
        return inputs.look(gate, command.annotations, self.config.least_coverage)

    def judge(
        self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, command: AdaptationCommand | None = None
    ) -> GateEvent | None:
        """Ask the gate before a stage; None when none stands there."""
        gate = self._gate_before(slot, target)
        if gate is None:
            return None
        if command is not None:
            gate = inputs.look(gate, command.annotations, self.config.least_coverage)
        self._events.judged(slot, gate, command.command_id if command is not None else "")
        return gate

    def _gate_before(self, slot: SeedSlot, target: SeedLifecycleStage.ValueType) -> GateEvent | None:
        loss = self._progress.loss
        if target == slot.stage:
            return None
        if target == lifecycle.BLENDING:
            return gradient_health.judge(
                slot,
                loss=loss,
                violations=self._boundary.violations_of(slot.seed_id),
                is_measured=self._boundary.isolation.is_healthy(slot.seed_id),
            )
        if target == lifecycle.SHADOWING:
            return stability.judge(slot, self.config)
        if target == lifecycle.PROBATIONARY:
            return interface.judge(slot, untold=step_packets.untold(slot))
        if target == lifecycle.FOSSILIZED:
            return system_impact.judge(slot, self.config, loss=loss)
        if target == lifecycle.DORMANT:
            return reset.judge(slot, owned_parameters=self._boundary.ownership.parameters_of(slot.seed_id))
        return None
