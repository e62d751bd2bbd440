from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from esper_rpc import verdict
from esper_rpc.envelope import reasons
from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome, CommandType
from esper_rpc.verdict import Verdict

from .inbox import CommandInbox, Queued
from .kernels.germination import Nursery
from .learning_rate import LearningRateAuthority
from .limits import LocalLimits
from .pausing import UNKNOWN_SEED, Pauses
from .progress import Progress
from .seed_slot import SeedSlot
from .surgery import Surgeon
from .telemetry.events import SeedEvents
from .telemetry.notices import WARNING, Tell

ROLLED_BACK = "rolled_back"
_MULTIPLIER = "learning_rate_multiplier"

Route = Callable[[Queued], Verdict | None]
"""Carries a command out at the safe point; None puts it off to the next one, where it is asked again."""


class Commands:
    """Carries out what the inbox holds, at the safe point, and settles what became of each command."""

    def __init__(
        self,
        *,
        inbox: CommandInbox,
        seeds: Mapping[str, SeedSlot],
        surgeon: Surgeon,
        nursery: Nursery,
        pauses: Pauses,
        learning_rate: LearningRateAuthority,
        limits: LocalLimits,
        events: SeedEvents,
        progress: Progress,
        tell: Tell,
    ) -> None:
        self._inbox = inbox
        self._seeds = seeds
        self._surgeon = surgeon
        self._nursery = nursery
        self._pauses = pauses
        self._learning_rate = learning_rate
        self._limits = limits
        self._events = events
        self._progress = progress
        self._tell = tell
        self._routes: dict[CommandType.ValueType, Route] = {}

    def route(self, command_type: CommandType.ValueType, carry_out: Route) -> None:
        """Have commands of a type carried out by somebody else: those that are not for seeds."""
        self._routes[command_type] = carry_out
        self._inbox.supported.add(command_type)

    def carry_out_waiting(self) -> list[CommandOutcome]:
        """Carry out what waits; a command that cannot be carried out yet waits for another safe point."""
        waiting = range(len(self._inbox))
        return [outcome for _ in waiting if (outcome := self._settle(self._inbox.take())) is not None]

    def _settle(self, queued: Queued) -> CommandOutcome | None:
        begun = time.perf_counter()
        what = verdict.failed(ROLLED_BACK) if self._is_outdated(queued) else self._carry_out(queued)
        self._tell_if_late(queued.command, (time.perf_counter() - begun) * 1e3)
        if what is None:
            self._inbox.put_back(queued)
            return None
        verifier, command = self._inbox.verifier, queued.command
        if what.result == CommandOutcome.RESULT_REJECTED:
            verifier.count(what.reason)
        outcome = what.on(command.command_id, self._progress.global_step, command)
        verifier.record_outcome(command.command_id, outcome)
        self._nursery.forget(command.command_id)
        return self._events.settled(outcome)

    def _carry_out(self, queued: Queued) -> Verdict | None:
        command = queued.command
        elsewhere = self._routes.get(command.command_type)
        if elsewhere is not None:
            return elsewhere(queued)
        if command.command_type == CommandType.COMMAND_TYPE_PAUSE:
            return self._pauses.hold(queued, self._seeds.values())
        if command.command_type == CommandType.COMMAND_TYPE_OPTIMIZER:
            return self._adjust_optimizer(command)
        slot = self._seeds.get(command.target_seed_id)
        return self._surgeon.operate(slot, queued) if slot is not None else verdict.failed(UNKNOWN_SEED)

    def _adjust_optimizer(self, command: AdaptationCommand) -> Verdict:
        wanted = command.optimizer_adjustment.hyperparameters
        if set(wanted) != {_MULTIPLIER}:
            return verdict.rejected(reasons.UNSUPPORTED)
        multiplier = wanted[_MULTIPLIER]
        least, most = self._limits.learning_rate_multiplier
        if not least <= multiplier <= most or not self._learning_rate.scale(multiplier):
            return verdict.rejected(reasons.LOCAL_LIMIT)
        return verdict.APPLIED

    def _is_outdated(self, queued: Queued) -> bool:
        """Whether a rollback came after it was verified; what is not for seeds may be the rollback itself."""
        is_routed = queued.command.command_type in self._routes
        return not is_routed and queued.receiver_epoch != self._inbox.verifier.receiver_epoch

    def _tell_if_late(self, command: AdaptationCommand, took_ms: float) -> None:
        # In a pause the deadline is how long it lasts.
        if command.command_type == CommandType.COMMAND_TYPE_PAUSE or not command.execution_deadline_ms:
            return
        if took_ms > command.execution_deadline_ms:
            self._tell(
                "deadline_violation", WARNING, reason="slow_command", seed_id=command.target_seed_id,
                command_id=command.command_id, took_ms=round(took_ms, 3), deadline_ms=command.execution_deadline_ms,
            )  # fmt: skip
