from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from esper_rpc.config import Range, validate

from .training_state import copied, tensors_in


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """How much is kept in memory for a fast rollback."""

    snapshots: Annotated[int, Range(0, 10)] = 5
    memory_mb: Annotated[int, Range(0, 10_000_000)] = 4096
    """All snapshots together; the least recently used goes first."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(eq=False, slots=True)
class Snapshot:
    """A copy in memory of all that a training must have again."""

    epoch: int
    step: int
    state: dict[str, Any]
    size_bytes: int
    is_being_written: bool = False
    """Whether it is on its way to the disk; nothing is copied over it meanwhile."""

    @property
    def digest(self) -> str:
        """Names it: SHA-256 over its step and its shapes. Its content is not read for that."""
        shapes = [list(tensor.shape) for tensor in tensors_in(self.state)]
        return hashlib.sha256(json.dumps([self.epoch, self.step, shapes]).encode()).hexdigest()


class SnapshotCache:
    """The last few snapshots, least recently used first. The training thread's alone, but for `is_being_written`."""

    def __init__(self, config: CacheConfig | None = None) -> None:
        self.config = config or CacheConfig()
        self._snapshots: list[Snapshot] = []

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def size_bytes(self) -> int:
        """The memory that all of them take."""
        return sum(snapshot.size_bytes for snapshot in self._snapshots)

    def take(self, state: Mapping[str, Any], *, epoch: int, step: int) -> Snapshot | None:
        """Copy a state, over the snapshot that has to go if there is one; None when it is larger than the bound."""
        size = sum(tensor.nbytes for tensor in tensors_in(state))
        spare = self._make_room(size)
        if spare is None:
            return None
        snapshot = Snapshot(epoch, step, copied(dict(state), spare), size)
        self._snapshots.append(snapshot)
        return snapshot

    def find(self, latest_step: int) -> Snapshot | None:
        """Return the newest one up to a step, None when there is none; it counts as used now."""
        found = max((each for each in self._snapshots if each.step <= latest_step), key=_step_of, default=None)
        if found is not None:
            self._snapshots.remove(found)
            self._snapshots.append(found)
        return found

    def forget_after(self, step: int) -> None:
        """Drop those of later steps, which a rollback went back behind."""
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.step <= step]

    def _make_room(self, size: int) -> dict[str, Any] | None:
        """Return tensors to copy into, perhaps none; None when there is no room for this size."""
        bound, spare = self.config.memory_mb * 2**20, {}
        if size > bound or not self.config.snapshots:
            return None
        while len(self._snapshots) >= self.config.snapshots or self.size_bytes + size > bound:
            oldest = self._snapshots.pop(0)
            spare = {} if oldest.is_being_written else oldest.state
        return spare


def _step_of(snapshot: Snapshot) -> int:
    return snapshot.step
