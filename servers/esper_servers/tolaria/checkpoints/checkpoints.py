from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from esper_rpc.errors import EsperError, FailedPrecondition
from esper_rpc.proto.leyline.v1 import EmergencyLevel, TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import observe_checkpoint, observe_checkpoint_failure, observe_rollback
from esper_servers.tolaria.rollback.ranks_participant import RanksParticipant
from esper_servers.tolaria.rollback.rollback import FAST, FULL, NOT_FINITE, Rollback, RollbackResult
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore, Loaded
from esper_servers.tolaria.state.manifest import Manifest
from esper_servers.tolaria.state.snapshot_cache import CacheConfig, Snapshot, SnapshotCache
from esper_servers.tolaria.state.training_state import RANKS, Stateful, TrainingState, first_not_finite

from .step_end import StepEnd

SOURCE = "tolaria"
MEMORY, DISK = "memory", "disk"
TOO_LARGE = "too_large"
_COMPLETE = {FAST: "fast_rollback_complete", FULL: "full_rollback_complete"}
_CRITICAL, _ERROR = TelemetryLevel.TELEMETRY_LEVEL_CRITICAL, TelemetryLevel.TELEMETRY_LEVEL_ERROR
_WARNING, _INFO = TelemetryLevel.TELEMETRY_LEVEL_WARNING, TelemetryLevel.TELEMETRY_LEVEL_INFO


class Checkpoints:
    """Keeps what a training must have again, in memory and on the disk, and takes it back. For the training thread.

    A checkpoint for the disk is copied into memory first and written from there beside the training.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        cache: SnapshotCache,
        store: CheckpointStore | None,
        rollback: Rollback,
        clock: Callable[[], float] = time.monotonic,
        ranks: RanksParticipant | None = None,
    ) -> None:
        """Of several ranks, this one being the first, `ranks` are the others."""
        self._state = state
        self._cache = cache
        self._store = store
        self._rollback = rollback
        self._clock = clock
        self._ranks = ranks
        self._writer = ThreadPoolExecutor(1, "esper-checkpoints")
        self._writing: Future[Any] | None = None
        self.step_end = StepEnd()
        """Where other threads ask for a checkpoint or a rollback: both belong between two steps."""
        self.last_rollback: RollbackResult | None = None
        self.after_rollback: Callable[[RollbackResult], object] = lambda _result: None
        """Told what became of each rollback, by the training thread; it must not raise."""

    def register(self, name: str, part: Stateful) -> None:
        """Have a scheduler, a scaler, a data loader saved and restored too; raises InvalidRequest for a name taken."""
        self._state.register(name, part)

    @property
    def cache_config(self) -> CacheConfig:
        """How much is kept in memory."""
        return self._cache.config

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._writing is not None and not self._writing.done()

    @property
    def has_disk(self) -> bool:
        """Whether there is a directory for them."""
        return self._store is not None

    def on_disk(self) -> list[Manifest]:
        """Return what those on the disk say of themselves, oldest first; from any thread."""
        return self._store.manifests() if self._store is not None else []

    def snapshot(self, *, epoch: int, step: int) -> Snapshot | None:
        """Keep a checkpoint in memory; None when a weight is no number, or it is larger than the memory for them."""
        state = self._capture(epoch, step)
        return self._take(state, epoch, step) if state is not None else None

    def save(self, *, epoch: int, step: int) -> Future[Manifest]:
        """Write a checkpoint to the disk, beside the training unless there is no room in memory for it.

        The future raises FailedPrecondition when there is no directory or a weight is no number, and what
        CheckpointStore.save raises.
        """
        done: Future[Manifest] = Future()
        state = self._capture(epoch, step)
        if self._store is None or state is None:
            done.set_exception(FailedPrecondition("There is no directory for checkpoints, or a weight is no number."))
            return done
        snapshot = self._take(state, epoch, step)
        if snapshot is None:
            return _settled(done, lambda: self._write(state, epoch, step))
        snapshot.is_being_written = True
        self._writing = self._writer.submit(self._write_snapshot, snapshot)
        return self._writing

    def resume(self) -> Manifest | None:
        """Restore the newest checkpoint on the disk that is whole; None when there is none yet.

        Raises:
            NotFound: When there are some and none can be used.
            FailedPrecondition: When it is of another model or of other parts.

        Where several ranks train the model each of them calls it, and goes on from the checkpoint of the first.
        """
        loaded = self._newest_on_disk()
        if self._ranks is not None:
            self._ranks.resume(None if loaded is None else loaded.state)
        if loaded is None:
            return None
        self._state.restore(loaded.state)
        return loaded.manifest

    def roll_back(
        self,
        *,
        latest_step: int,
        reason: str,
        severity: EmergencyLevel.ValueType = EmergencyLevel.EMERGENCY_LEVEL_ELEVATED,
        tier: str = FAST,
    ) -> RollbackResult:
        """Go back to the newest checkpoint up to a step, between two steps; raises OutOfStep alone.

        What was kept of later steps is forgotten, on the disk set aside. See RollbackResult for what must follow, which
        `after_rollback` sees to where the trainer runtime keeps the checkpoints.
        """
        result = self._rollback.run(latest_step=latest_step, reason=reason, severity=severity, tier=tier)
        self.last_rollback = result
        if result.succeeded:
            self._cache.forget_after(result.step)
            # Behind a checkpoint that is still being written, which is of the future too.
            self._writer.submit(self._abandon_after, result.step)
        self._tell_rollback(result)
        self.after_rollback(result)
        return result

    def settle(self) -> None:
        """End what was due between two steps; raises OutOfStep when a rollback that failed left ranks apart."""
        if self._ranks is not None:
            self._ranks.settle()

    def close(self) -> None:
        """Wait until what is being written is on the disk."""
        self.step_end.close()
        self._writer.shutdown()

    def _newest_on_disk(self) -> Loaded | None:
        try:
            if self._store is None or not self._store.names():
                return None
            loaded = self._store.load()
            self._tell_skipped(loaded.skipped)
            self._state.check(loaded.state)
            return loaded
        except EsperError:
            # The other ranks wait to be told.
            if self._ranks is not None:
                self._ranks.resume(None)
            raise

    def _capture(self, epoch: int, step: int) -> dict[str, Any] | None:
        state = self._state.capture()
        broken = first_not_finite(state)
        if broken:
            observe_checkpoint_failure(MEMORY, NOT_FINITE)
            tell_event(SOURCE, "checkpoint_not_taken", _WARNING, reason=NOT_FINITE, step_index=step, weight=broken)
            return None
        if self._ranks is not None:
            state[RANKS] = self._ranks.keep(epoch, step)
        return state

    def _take(self, state: dict[str, Any], epoch: int, step: int) -> Snapshot | None:
        begun = self._clock()
        snapshot = self._cache.take(state, epoch=epoch, step=step)
        if snapshot is None:
            observe_checkpoint_failure(MEMORY, TOO_LARGE)
        else:
            observe_checkpoint(MEMORY, self._clock() - begun)
        return snapshot

    def _write_snapshot(self, snapshot: Snapshot) -> Manifest:
        try:
            return self._write(snapshot.state, snapshot.epoch, snapshot.step)
        finally:
            snapshot.is_being_written = False

    def _write(self, state: dict[str, Any], epoch: int, step: int) -> Manifest:
        assert self._store is not None
        begun = self._clock()
        try:
            manifest = self._store.save(state, epoch=epoch, step=step)
        except EsperError as error:
            observe_checkpoint_failure(DISK, error.reason.lower())
            tell_event(
                SOURCE, "checkpoint_failed", _ERROR, reason=error.reason.lower(), step_index=step, error=error.message
            )
            raise
        seconds = self._clock() - begun
        observe_checkpoint(DISK, seconds)
        tell_event(
            SOURCE, "checkpoint_saved", _INFO, reason="saved", step_index=step, checkpoint=manifest.name,
            size_bytes=manifest.size_bytes, elapsed_ms=round(seconds * 1000, 1),
        )  # fmt: skip
        return manifest

    def _abandon_after(self, step: int) -> None:
        if self._store is None:
            return
        try:
            self._store.abandon_after(step)
        except EsperError as error:
            tell_event(SOURCE, "checkpoint_failed", _ERROR, reason=error.reason.lower(), error=error.message)

    def _tell_skipped(self, skipped: tuple[tuple[str, str], ...]) -> None:
        for name, reason in skipped:
            tell_event(SOURCE, "checkpoint_skipped", _WARNING, reason=reason, checkpoint=name)

    def _tell_rollback(self, result: RollbackResult) -> None:
        self._tell_skipped(result.skipped)
        observe_rollback(result.tier, result.elapsed_ms / 1000)
        failures = "; ".join(" ".join(filter(None, failure)) for failure in result.failures)
        tell_event(
            SOURCE, _COMPLETE.get(result.tier, "rollback_failed"), _ERROR if result.succeeded else _CRITICAL,
            reason=result.reason, step_index=result.step, epoch=result.epoch, checkpoint=result.digest,
            elapsed_ms=round(result.elapsed_ms, 1), failures=failures,
            severity=EmergencyLevel.Name(result.severity).removeprefix("EMERGENCY_LEVEL_"),
        )  # fmt: skip


def _settled(done: Future[Manifest], work: Callable[[], Manifest]) -> Future[Manifest]:
    try:
        done.set_result(work())
    except EsperError as error:
        done.set_exception(error)
    return done
