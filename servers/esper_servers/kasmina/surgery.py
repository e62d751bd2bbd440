from __future__ import annotations

from collections.abc import Mapping

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType, SeedLifecycleStage

from . import gates, lifecycle, verdict
from .alpha import schedule_of
from .blend_report import report_blend
from .events import SeedEvents
from .germination import Nursery
from .inbox import Queued
from .kernel_library import Kernel, KernelLibrary
from .learning_rate import LearningRateAuthority
from .limits import LocalLimits
from .pausing import UNKNOWN_SEED, Pauses
from .progress import Progress
from .seed_slot import SeedSlot
from .verdict import Verdict

EMBARGO_STEPS = 100
KERNEL_WAIT_STEPS = 200
ILLEGAL_TRANSITION = "illegal_transition"
KERNEL_LATE = "kernel_late"
COMMANDED = "commanded"
_MULTIPLIER = "learning_rate_multiplier"


class Surgeon:
    """Carries out commands on seeds, and what time does to them. Works at the safe point only."""

    def __init__(
        self,
        *,
        seeds: Mapping[str, SeedSlot],
        library: KernelLibrary,
        nursery: Nursery,
        pauses: Pauses,
        learning_rate: LearningRateAuthority,
        limits: LocalLimits,
        events: SeedEvents,
        progress: Progress,
    ) -> None:
        self._seeds = seeds
        self._library = library
        self._nursery = nursery
        self._pauses = pauses
        self._learning_rate = learning_rate
        self._limits = limits
        self._events = events
        self._progress = progress

    def carry_out(self, queued: Queued) -> Verdict | None:
        """Do what a command says; None when its kernel is still on its way."""
        command = queued.command
        if command.command_type == CommandType.COMMAND_TYPE_PAUSE:
            return self._pauses.hold(command, self._seeds.values())
        if command.command_type == CommandType.COMMAND_TYPE_OPTIMIZER:
            return self._adjust_optimizer(command)
        slot = self._seeds.get(command.target_seed_id)
        if slot is None:
            return verdict.failed(UNKNOWN_SEED)
        target = lifecycle.target_of(command.seed_operation.operation, slot.stage)
        if target is None:
            return verdict.rejected(ILLEGAL_TRANSITION)
        if target == lifecycle.GERMINATED:
            return self._germinate(slot, queued)
        return self._move_through_gate(slot, target, command)

    def finalize(self, slot: SeedSlot) -> None:
        """End a step for a seed: its optimizer, its pause, and the moves that need no command."""
        slot.steps_in_stage += 1
        self._pauses.release(slot)
        slot.step_optimizer()
        if slot.stage in lifecycle.LIVE and slot.has_failed():
            self._cull(slot, gates.why_failed(slot))
        else:
            self._recover(slot)

    def _germinate(self, slot: SeedSlot, queued: Queued) -> Verdict | None:
        command = queued.command
        found = self._library.get(command.seed_operation.blueprint_id)
        if found is None and self._progress.global_step - queued.since < KERNEL_WAIT_STEPS:
            return None
        if sum(each.stage in lifecycle.LIVE for each in self._seeds.values()) >= self._limits.live_seeds:
            return verdict.rejected(reasons.LOCAL_LIMIT)
        self._move(slot, lifecycle.GERMINATED, "germinate", command.command_id)
        reason = self._plant(slot, command, found)
        if reason:
            self._cull(slot, reason, command.command_id)
            return verdict.failed(reason)
        return verdict.APPLIED

    def _plant(self, slot: SeedSlot, command: AdaptationCommand, found: Kernel | str | None) -> str:
        if isinstance(found, Kernel):
            return self._nursery.plant(slot, command, found, self._seeds.values())
        return found or KERNEL_LATE

    def _move_through_gate(
        self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, command: AdaptationCommand
    ) -> Verdict:
        closed = gates.check(slot, target, self._progress.loss)
        if closed is None:
            self._move_as_commanded(slot, target, command)
            return verdict.APPLIED
        if closed.has_failed:
            self._cull(slot, closed.reason, command.command_id)
        return verdict.failed(closed.reason)

    def _move_as_commanded(
        self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, command: AdaptationCommand
    ) -> None:
        if target == lifecycle.CULLED:
            self._cull(slot, COMMANDED, command.command_id)
            return
        self._move(slot, target, COMMANDED, command.command_id)
        if target == lifecycle.BLENDING:
            slot.schedule, slot.loss_at_graft = schedule_of(command), self._progress.loss_or_none()
            report_blend(self._events, slot, slot.blend_as(command.annotations))
        if target == lifecycle.FOSSILIZED and slot.site.seed is not None:
            slot.optimizer = None
            self._learning_rate.adopt(slot.site.seed)

    def _cull(self, slot: SeedSlot, reason: str, command_id: str = "") -> None:
        before = slot.stage
        slot.move(lifecycle.CULLED)
        slot.uproot()
        slot.embargo_left = EMBARGO_STEPS
        self._events.moved(slot, before, reason, command_id)

    def _recover(self, slot: SeedSlot) -> None:
        """Culled, embargoed, reset, dormant: the moves that need no command."""
        if slot.stage == lifecycle.EMBARGOED:
            slot.embargo_left -= 1
        onward = {
            lifecycle.CULLED: lifecycle.EMBARGOED,
            lifecycle.EMBARGOED: lifecycle.RESETTING if slot.embargo_left <= 0 else None,
            lifecycle.RESETTING: lifecycle.DORMANT,
        }.get(slot.stage)
        if onward is not None:
            self._move(slot, onward, "recovery")

    def _move(self, slot: SeedSlot, target: SeedLifecycleStage.ValueType, reason: str, command_id: str = "") -> None:
        before = slot.stage
        if target == before:
            slot.is_fine_tuning = True
        else:
            slot.move(target)
        self._events.moved(slot, before, reason, command_id)

    def _adjust_optimizer(self, command: AdaptationCommand) -> Verdict:
        wanted = command.optimizer_adjustment.hyperparameters
        if set(wanted) != {_MULTIPLIER}:
            return verdict.rejected(reasons.UNSUPPORTED)
        multiplier = wanted[_MULTIPLIER]
        least, most = self._limits.learning_rate_multiplier
        if not least <= multiplier <= most or not self._learning_rate.scale(multiplier):
            return verdict.rejected(reasons.LOCAL_LIMIT)
        return verdict.APPLIED
