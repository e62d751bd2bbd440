from __future__ import annotations

from collections.abc import Callable, Mapping

from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandType, SeedLifecycleStage
from esper_servers.blueprints.out_of_memory import OUT_OF_MEMORY, describe

from . import gates, lifecycle, verdict
from .alpha import schedule_of
from .events import SeedEvents
from .germination import Nursery
from .inbox import Queued
from .learning_rate import LearningRateAuthority
from .limits import LocalLimits
from .live_seeds import LiveSeeds
from .memory import MemoryGovernor
from .notices import INFO, WARNING, Tell
from .ownership import PARAMETER_VIOLATION, Ownership
from .pausing import UNKNOWN_SEED, Pauses
from .prewarm import Prepared
from .progress import Progress
from .seed_slot import SeedSlot
from .verdict import Verdict

EMBARGO_STEPS = 100
KERNEL_WAIT_STEPS = 200
ILLEGAL_TRANSITION = "illegal_transition"
KERNEL_LATE = "kernel_late"
MEMORY_BOUNDS = "memory_bounds"
COMMANDED = "commanded"
INVALID_BLEND_CONFIG = "invalid_blend_config"
_MULTIPLIER = "learning_rate_multiplier"

Route = Callable[[Queued], Verdict | None]
"""Carries a command out at the safe point; None puts it off to the next one, where it is asked again."""


class Surgeon:
    """Carries out commands on seeds, and what time does to them. Works at the safe point only."""

    def __init__(
        self,
        *,
        seeds: Mapping[str, SeedSlot],
        nursery: Nursery,
        ownership: Ownership,
        governor: MemoryGovernor,
        live: LiveSeeds,
        pauses: Pauses,
        learning_rate: LearningRateAuthority,
        limits: LocalLimits,
        events: SeedEvents,
        progress: Progress,
        tell: Tell,
    ) -> None:
        self._seeds = seeds
        self._nursery = nursery
        self._ownership = ownership
        self._governor = governor
        self._live = live
        self._pauses = pauses
        self._learning_rate = learning_rate
        self._limits = limits
        self._events = events
        self._progress = progress
        self._tell = tell
        self.routes: dict[CommandType.ValueType, Route] = {}
        """Who carries out the commands of a type that are not for seeds."""

    def carry_out(self, queued: Queued) -> Verdict | None:
        """Do what a command says; None when its kernel is still on its way."""
        command = queued.command
        elsewhere = self.routes.get(command.command_type)
        if elsewhere is not None:
            return elsewhere(queued)
        if command.command_type == CommandType.COMMAND_TYPE_PAUSE:
            return self._pauses.hold(queued, self._seeds.values())
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
        held_back = self._pauses.release(slot)
        self._step_optimizer(slot)
        reason = held_back or self._why_it_must_go(slot)
        if slot.stage in lifecycle.LIVE and reason:
            self._fall_back(slot, reason)
        else:
            self._recover(slot)

    def _step_optimizer(self, slot: SeedSlot) -> None:
        try:
            slot.step_optimizer()
        except RuntimeError as error:
            # Its first step allocates the optimizer's state; what is short there must not end the user's step.
            slot.site.failure = describe(error)

    def _why_it_must_go(self, slot: SeedSlot) -> str:
        foreign = slot.site.take_foreign()
        if foreign:
            self._ownership.validate(slot.seed_id, foreign)
        if self._ownership.is_repeated(slot.seed_id):
            return PARAMETER_VIOLATION
        return gates.why_failed(slot) if slot.has_failed() else ""

    def _fall_back(self, slot: SeedSlot, reason: str, command_id: str = "") -> None:
        """Leave the host alone where a kernel has failed."""
        failure = slot.site.failure
        self._cull(slot, reason, command_id)
        self._tell("fallback_applied", WARNING, reason=reason, seed_id=slot.seed_id, failure=failure)
        if reason == OUT_OF_MEMORY:
            self._governor.ran_out()

    def _germinate(self, slot: SeedSlot, queued: Queued) -> Verdict | None:
        command = queued.command
        if len(self._live) >= self._limits.live_seeds:
            return verdict.rejected(reasons.LOCAL_LIMIT)
        if not self._governor.admits():
            return verdict.rejected(MEMORY_BOUNDS)
        prepared = self._nursery.prepared(slot, command)
        if prepared is None and self._progress.global_step - queued.since < KERNEL_WAIT_STEPS:
            return None
        self._move(slot, lifecycle.GERMINATED, "germinate", command.command_id)
        reason = self._nursery.plant(slot, prepared or Prepared(reason=KERNEL_LATE))
        if reason:
            self._fall_back(slot, reason, command.command_id)
            return verdict.failed(reason)
        return verdict.APPLIED

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
            reason = INVALID_BLEND_CONFIG
            self._tell("fallback_applied", WARNING, reason=reason, seed_id=slot.seed_id, problem=problem, **details)
        self._tell("blend_config", INFO, reason=COMMANDED, seed_id=slot.seed_id, **details)

    def _cull(self, slot: SeedSlot, reason: str, command_id: str = "") -> None:
        before = slot.stage
        slot.move(lifecycle.CULLED)
        slot.uproot()
        self._ownership.release(slot.seed_id)
        self._live.note(slot)
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
            self._live.note(slot)
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
