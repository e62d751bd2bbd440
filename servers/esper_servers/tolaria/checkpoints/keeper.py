from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from esper_rpc.proto.tolaria.v1 import Checkpoint, RollbackTier


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What a rollback did."""

    checkpoint: Checkpoint
    tier: RollbackTier.ValueType
    seconds: float
    is_late: bool = False
    """Whether it took longer than it may."""


class CheckpointKeeper(Protocol):
    """Keeps the checkpoints of a run. Writing and returning happen on the training thread, at a safe point."""

    def checkpoints(self) -> Sequence[Checkpoint]:
        """Return what can be returned to, oldest first; called from any thread."""
        ...

    def create_checkpoint(self, reason: str) -> Checkpoint:
        """Write a checkpoint."""
        ...

    def rollback(self, checkpoint: str, tier: RollbackTier.ValueType, reason: str) -> RolledBack:
        """Return to a checkpoint, the newest that can be read when it is not named; FULL never looks in memory.

        Raises:
            NotFound: There is no such checkpoint, or none at all.
            DataLoss: None can be read; the run is as it was.
        """
        ...
