"""What in a run is an emergency by itself. Pure: it is told what happened, and says what that calls for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from esper_rpc.config import Range, validate
from esper_rpc.proto.tolaria.v1 import RollbackTier
from esper_servers.tolaria.rollback.rollback import RollbackResult

from .levels import CONSERVATIVE, ELEVATED, HALT, Level

FAST, FULL = RollbackTier.ROLLBACK_TIER_FAST, RollbackTier.ROLLBACK_TIER_FULL
LOSS_EXPLODED, LOSS_NOT_FINITE, ACCURACY_COLLAPSED = "loss_exploded", "loss_not_finite", "accuracy_collapsed"
EPOCHS_FAILED, ROLLBACK_LATE, ROLLBACK_FAILED = "epochs_failed", "rollback_late", "rollback_failed"
TOO_MANY_ROLLBACKS, ROLLBACK_SLOW = "too_many_rollbacks", "rollback_slow"
SMOOTHING = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class EmergencyConfig:
    """When a run is in danger, and what it lets others do about it."""

    loss_explosion: Annotated[float, Range(1.1, 1_000_000)] = 15.0
    """So many times the smoothed loss."""
    warm_up_steps: Annotated[int, Range(1, 1_000_000_000)] = 10
    """Steps before a loss is judged."""
    accuracy_collapse: Annotated[float, Range(0, 1)] = 0.5
    """The share of the best accuracy so far that an epoch may lose."""
    failed_epochs: Annotated[int, Range(1, 1_000_000)] = 3
    """So many failed epochs in a row halt the run."""
    rollbacks_per_epoch: Annotated[int, Range(0, 10_000)] = 3
    """One more halts the run."""
    calm_epochs: Annotated[int, Range(1, 1_000_000)] = 3
    """So many good epochs in a row end what the trainer raised by itself, but no halt."""
    allow_remote_halt: bool = False
    """Whether a HALT that weatherlight or tamiyo signed is obeyed."""
    share: bool = True
    """Whether other processes on the host are told by shared memory."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True)
class Trigger:
    """An emergency, and what the run should return to because of it."""

    level: Level
    reason: str
    rollback: RollbackTier.ValueType = RollbackTier.ROLLBACK_TIER_UNSPECIFIED


class Escalation:
    """Watches losses, epochs and rollbacks of one run."""

    def __init__(self, config: EmergencyConfig | None = None) -> None:
        self._config = config or EmergencyConfig()
        self._loss = 0.0
        self._steps = 0
        self._has_exploded = False
        self._best_accuracy = 0.0
        self._rollbacks = 0
        self.failed_epochs = 0
        """In a row."""

    def step(self, loss: float) -> Trigger | None:
        """Judge the loss of a step. An explosion is told once, until the loss is back or the run was rolled back."""
        if not math.isfinite(loss):
            return self._explode(LOSS_NOT_FINITE)
        if self._steps >= self._config.warm_up_steps and 0 < self._loss * self._config.loss_explosion < loss:
            return self._explode(LOSS_EXPLODED)
        self._has_exploded = False
        self._loss = loss if not self._steps else self._loss + SMOOTHING * (loss - self._loss)
        self._steps += 1
        return None

    def epoch(self, *, failed: bool, accuracy: float | None = None) -> Trigger | None:
        """Judge an epoch that ended."""
        self._rollbacks = 0
        self.failed_epochs = self.failed_epochs + 1 if failed else 0
        if self.failed_epochs >= self._config.failed_epochs:
            return Trigger(HALT, EPOCHS_FAILED)
        return self._accuracy(accuracy) if accuracy is not None and math.isfinite(accuracy) else None

    def rolled_back(self, tier: RollbackTier.ValueType, *, is_late: bool) -> Trigger | None:
        """Judge a rollback that was done: a fast one that was late may be repeated from disk, a full one not."""
        self._has_exploded, self._rollbacks = False, self._rollbacks + 1
        return Trigger(HALT if tier == FULL else CONSERVATIVE, ROLLBACK_LATE) if is_late else None

    def rollback_failed(self, tier: RollbackTier.ValueType) -> Trigger:
        """Say what is left when a rollback could not be done."""
        return Trigger(HALT, ROLLBACK_FAILED) if tier == FULL else Trigger(CONSERVATIVE, ROLLBACK_FAILED, FULL)

    def may_roll_back(self) -> Trigger | None:
        """None when one more rollback is allowed in this epoch, else what to do instead."""
        is_over = self._rollbacks >= self._config.rollbacks_per_epoch
        return Trigger(HALT, TOO_MANY_ROLLBACKS) if is_over else None

    def _explode(self, reason: str) -> Trigger | None:
        if self._has_exploded:
            return None
        self._has_exploded = True
        return Trigger(CONSERVATIVE, reason, FAST)

    def _accuracy(self, accuracy: float) -> Trigger | None:
        if accuracy < self._best_accuracy * (1 - self._config.accuracy_collapse):
            return Trigger(ELEVATED, ACCURACY_COLLAPSED, FULL)
        self._best_accuracy = max(self._best_accuracy, accuracy)
        return None


def called_for_by(result: RollbackResult) -> Trigger | None:
    """Say what a rollback calls for, whoever asked for it.

    One that was refused left the run as it was, and is the business of who asked: a mesh that lies could halt by it.
    """
    if result.has_changed or result.is_late:
        return Trigger(HALT, ROLLBACK_LATE if result.succeeded else ROLLBACK_FAILED)
    if result.succeeded and result.needs_conservative_mode:
        return Trigger(CONSERVATIVE, ROLLBACK_SLOW)
    return None
