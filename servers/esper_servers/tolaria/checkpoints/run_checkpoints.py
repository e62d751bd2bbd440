from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from esper_rpc.errors import DataLoss, FailedPrecondition, NotFound
from esper_rpc.proto.leyline.v1 import EmergencyLevel
from esper_rpc.proto.tolaria.v1 import Checkpoint, RollbackTier
from esper_servers.tolaria.rollback.rollback import FAST, FULL, NO_SNAPSHOT, NO_STORE
from esper_servers.tolaria.state.manifest import Manifest

from .checkpoints import Checkpoints
from .keeper import RolledBack

_ANY_STEP = 2**53
_TIERS = {FAST: RollbackTier.ROLLBACK_TIER_FAST, FULL: RollbackTier.ROLLBACK_TIER_FULL}
_NOTHING_THERE = frozenset({NO_SNAPSHOT, NO_STORE, "no_checkpoint"})


class Run(Protocol):
    """How far a run is."""

    @property
    def global_step(self) -> int:
        """The last step."""
        ...

    @property
    def epoch(self) -> int:
        """The present epoch."""
        ...


class RunCheckpoints:
    """The checkpoints of a run as operators and emergencies use them. A CheckpointKeeper."""

    def __init__(self, checkpoints: Checkpoints, run: Run) -> None:
        self._checkpoints = checkpoints
        self._run = run

    def checkpoints(self) -> Sequence[Checkpoint]:
        """Return those on the disk that look whole, oldest first."""
        return [_told(manifest) for manifest in self._checkpoints.on_disk()]

    def create_checkpoint(self, reason: str) -> Checkpoint:
        """Write one to the disk, in memory where there is no directory; the training waits for it.

        Raises:
            FailedPrecondition: When a weight is no number, or there is neither a directory nor room in memory.
            ResourceExhausted, Unavailable: When the disk is full, or cannot be written.
        """
        run = self._run
        if self._checkpoints.has_disk:
            return _told(self._checkpoints.save(epoch=run.epoch, step=run.global_step).result())
        snapshot = self._checkpoints.snapshot(epoch=run.epoch, step=run.global_step)
        if snapshot is None:
            raise FailedPrecondition("There is no room in memory for a checkpoint, or a weight is no number.")
        digest = bytes.fromhex(snapshot.digest)
        return Checkpoint(
            name=f"memory-step-{snapshot.step}", digest=digest, global_step=snapshot.step, epoch=snapshot.epoch
        )

    def rollback(self, checkpoint: str, tier: RollbackTier.ValueType, reason: str) -> RolledBack:
        """Return to the newest checkpoint up to the one that is named, from memory if it may be.

        Raises:
            NotFound: There is no such checkpoint, or none at all.
            DataLoss: None could be used; the run is as it was, unless the reason says that it was changed.
        """
        latest = self._step_of(checkpoint) if checkpoint else _ANY_STEP
        wanted = FULL if tier == RollbackTier.ROLLBACK_TIER_FULL else FAST
        result = self._checkpoints.roll_back(
            latest_step=latest, reason=reason, tier=wanted, severity=EmergencyLevel.EMERGENCY_LEVEL_ELEVATED
        )
        if result.succeeded:
            told = Checkpoint(
                name=checkpoint or f"step-{result.step}", digest=bytes.fromhex(result.digest),
                global_step=result.step, epoch=result.epoch,
            )  # fmt: skip
            is_late = result.is_late if result.tier == FULL else result.needs_conservative_mode
            return RolledBack(told, _TIERS[result.tier], result.elapsed_ms / 1000, is_late)
        why = ", ".join(f"{failure.tier}: {failure.reason}" for failure in result.failures)
        if {failure.reason for failure in result.failures} <= _NOTHING_THERE:
            raise NotFound(f"There is no checkpoint to return to ({why}).")
        changed = " The model may stand between two states: restore it or stop." if result.has_changed else ""
        raise DataLoss(f"No checkpoint could be used ({why}).{changed}")

    def _step_of(self, name: str) -> int:
        steps = {each.name: each.step for each in self._checkpoints.on_disk()}
        in_memory = name.removeprefix("memory-step-")
        if name not in steps and (in_memory == name or not in_memory.isdigit()):
            raise NotFound(f"There is no checkpoint {name!r}.")
        return steps.get(name) or int(in_memory)


def _told(manifest: Manifest) -> Checkpoint:
    return Checkpoint(
        name=manifest.name, digest=bytes.fromhex(manifest.digest), global_step=manifest.step, epoch=manifest.epoch,
        size_bytes=manifest.size_bytes,
    )  # fmt: skip
