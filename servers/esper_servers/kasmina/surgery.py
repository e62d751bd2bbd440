from __future__ import annotations

from collections.abc import Mapping

import structlog

from esper_rpc import verdict
from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, SeedLifecycleGate, SeedLifecycleStage
from esper_rpc.verdict import Verdict
from esper_servers.blueprints.out_of_memory import OUT_OF_MEMORY, describe

from . import lifecycle
from .blending.alpha import schedule_of
from .boundary import Boundary
from .gatekeeper import KERNEL_LATE, Gatekeeper
from .gates.health import SEED_FAILED
from .gates.report import FAILED, PASSED
from .inbox import Queued
from .isolation.isolation import ISOLATION_BREAKER_OPEN
from .kernels.germination import Nursery
from .kernels.prewarm import Prepared
from .learning_rate import LearningRateAuthority
from .limits import LocalLimits
from .live_seeds import LiveSeeds
from .memory import MemoryGovernor
from .patience import Patience
from .progress import Progress
from .rollback_payloads import NO_GATE, RollbackPayloads
from .seed_slot import SeedSlot
from .telemetry.events import SeedEvents
from .telemetry.notices import INFO, WARNING, Tell

log = structlog.get_logger(__name__)

KERNEL_WAIT_STEPS = 200
ILLEGAL_TRANSITION = "illegal_transition"
MEMORY_BOUNDS = "memory_bounds"
COMMANDED = "commanded"
TERMINATED = "terminated"
INVALID_BLEND_CONFIG = "invalid_blend_config"
NOTHING = Prepared()


class Surgeon:
    """Takes seeds from stage to stage, as commands say or at the end of a step. Works at the safe point only."""

    def __init__(
        self,
        *,
        seeds: Mapping[str, SeedSlot],
        gatekeeper: Gatekeeper,
        nursery: Nursery,
        boundary: Boundary,
        governor: MemoryGovernor,
        live: LiveSeeds,
        learning_rate: LearningRateAuthority,
        limits: LocalLimits,
        events: SeedEvents,
        progress: Progress,
        tell: Tell,
    ) -> None:
        self._seeds = seeds
        self._gatekeeper = gatekeeper
        self._nursery = nursery
        self._boundary = boundary
        self._governor = governor
        self._live = live
        self._learning_rate = learning_rate
        self._limits = limits
        self._events = events
        self._progress = progress
        self._tell = tell
        self.patience = Patience(config=gatekeeper.config, progress=progress)
        self.rollback_payloads = RollbackPayloads()

    def operate(self, slot: SeedSlot, queued: Queued) -> Verdict | None:
        """Do what a command says to its seed; None when its kernel is still on its way."""
        try:
            return self._operate(slot, queued)
        except Exception as error:  # Seeds and the user's optimizer are foreign code: no command ends the user's step.
            log.error("command_failed", seed_id=slot.seed_id, exc_info=error)
            if slot.stage in lifecycle.LIVE:
                slot.site.failure = describe(error)
            return verdict.failed(SEED_FAILED)

    def move(self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, reason: str, command_id: str = "") -> None:
        """Let a seed begin a stage, or begin to learn in the one it is in."""
        before = slot.stage
        if target == before:
            slot.is_fine_tuning = True
        else:
            slot.move(target)
            self._live.note(slot)
            self._boundary.isolation.follow(slot)
        self.patience.renew(slot)
        self._events.moved(slot, before, reason, command_id)

    def fall_back(self, slot: SeedSlot, reason: str, command_id: str = "") -> None:
        """Leave the host alone where a kernel has failed."""
        failure, slot.fallback_used = slot.site.failure, True
        self._cull(slot, reason, command_id)
        self._tell("fallback_applied", WARNING, reason=reason, seed_id=slot.seed_id, failure=failure)
        if reason == OUT_OF_MEMORY:
            self._governor.ran_out()

    def lose_patience(self) -> None:
        """Cull a grafted seed that does harm, or that nobody has moved on for long; call it once a step."""
        found = self.patience.look(self._seeds[seed_id] for seed_id in self._live)
        if found is not None:
            slot, gate = found
            self._events.judged(slot, gate, command_id="")
            self._cull(slot, gate.reason, gate=gate.gate)

    def terminate(self, slot: SeedSlot) -> None:
        """Take a seed out for good: no operation leads back. A fossil leaves the optimizer, too."""
        if slot.stage == lifecycle.TERMINATED:
            return
        if slot.stage == lifecycle.FOSSILIZED and slot.site.seed is not None:
            self._learning_rate.release(slot.site.seed)
        self._take_out(slot, lifecycle.TERMINATED, TERMINATED)
        slot.reset()

    def _operate(self, slot: SeedSlot, queued: Queued) -> Verdict | None:
        command = queued.command
        target = lifecycle.target_of(command.seed_operation.operation, slot.stage)
        if target is None:
            return verdict.rejected(ILLEGAL_TRANSITION)
        if not self._boundary.isolation.admits(command.seed_operation.operation):
            return verdict.rejected(ISOLATION_BREAKER_OPEN)
        if target == lifecycle.GERMINATED:
            return self._germinate(slot, queued)
        return self._move_through_gate(slot, target, command)

    def _germinate(self, slot: SeedSlot, queued: Queued) -> Verdict | None:
        command = queued.command
        if len(self._live) >= self._limits.live_seeds:
            return verdict.rejected(reasons.LOCAL_LIMIT)
        if not self._governor.admits():
            return verdict.rejected(MEMORY_BOUNDS)
        is_late = self._progress.global_step - queued.since >= KERNEL_WAIT_STEPS
        kernel = self._nursery.kernel_for(command) or (KERNEL_LATE if is_late else None)
        if kernel is None:
            return None
        gate = self._gatekeeper.look_at(command, kernel)
        # Before the module is built: what must not be planted is not run either.
        prepared = self._nursery.module_for(slot, command, kernel) if gate.result == PASSED else NOTHING
        if prepared is None and not is_late:
            return None
        self._events.judged(slot, gate, command.command_id)
        if gate.result != PASSED:
            return verdict.failed(gate.reason)
        return self._plant(slot, prepared or Prepared(reason=KERNEL_LATE), command.command_id)

    def _plant(self, slot: SeedSlot, prepared: Prepared, command_id: str) -> Verdict:
        self.move(slot, lifecycle.GERMINATED, "germinate", command_id)
        reason = self._nursery.plant(slot, prepared)
        if reason:
            self.fall_back(slot, reason, command_id)
            return verdict.failed(reason)
        return verdict.APPLIED

    def _move_through_gate(
        self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, command: AdaptationCommand
    ) -> Verdict:
        gate = self._gatekeeper.judge(slot, target, command)
        if gate is None or gate.result == PASSED:
            self._move_as_commanded(slot, target, command)
            return verdict.APPLIED
        if gate.result == FAILED:
            self._cull(slot, gate.reason, command.command_id, gate.gate)
        return verdict.failed(gate.reason)

    def _move_as_commanded(
        self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, command: AdaptationCommand
    ) -> None:
        if target == lifecycle.CULLED:
            self._cull(slot, COMMANDED, command.command_id)
            return
        self.move(slot, target, COMMANDED, command.command_id)
        if target == lifecycle.BLENDING:
            progress = self._progress
            slot.begin_blending(schedule_of(command), loss=progress.loss_or_none(), step=progress.global_step)
            self._blend_as_commanded(slot, command)
        if target == lifecycle.FOSSILIZED and slot.site.seed is not None:
            slot.optimizer = None
            slot.adopted_as = 1 + max(each.adopted_as for each in self._seeds.values())
            self._learning_rate.adopt(slot.site.seed)

    def _blend_as_commanded(self, slot: SeedSlot, command: AdaptationCommand) -> None:
        problem, blend = slot.blend_as(command.annotations), slot.blend
        details: dict[str, str | float] = {
            "mode": blend.mode, "source": blend.source, "alpha_vec_len": len(blend.alpha_vec)
        }  # fmt: skip
        if problem:
            reason, slot.fallback_used = INVALID_BLEND_CONFIG, True
            self._tell("fallback_applied", WARNING, reason=reason, seed_id=slot.seed_id, problem=problem, **details)
        self._tell("blend_config", INFO, reason=COMMANDED, seed_id=slot.seed_id, **details)

    def _cull(
        self, slot: SeedSlot, reason: str, command_id: str = "", gate: SeedLifecycleGate.ValueType = NO_GATE
    ) -> None:
        self._take_out(slot, lifecycle.CULLED, reason, command_id, gate)
        slot.embargo_left = self._gatekeeper.config.embargo_seconds

    def _take_out(
        self,
        slot: SeedSlot,
        stage: SeedLifecycleStage.ValueType,
        reason: str,
        command_id: str = "",
        gate: SeedLifecycleGate.ValueType = NO_GATE,
    ) -> None:
        before, step = slot.stage, self._progress.global_step
        rollback = self.rollback_payloads.record(slot, reason=reason, step=step, gate=gate)
        slot.move(stage)
        slot.uproot()
        self._boundary.release(slot.seed_id)
        self._live.note(slot)
        self._events.moved(slot, before, reason, command_id, rollback)
