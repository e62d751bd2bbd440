from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, NamedTuple, Protocol

import structlog

from esper_client.seed_host import OutOfStep
from esper_rpc.config import Range, validate
from esper_rpc.errors import DeadlineExceeded, EsperError
from esper_rpc.proto.leyline.v1 import EmergencyLevel
from esper_servers.tolaria.state.checkpoint_store import CheckpointStore, Skipped
from esper_servers.tolaria.state.snapshot_cache import SnapshotCache
from esper_servers.tolaria.state.training_state import first_not_finite

log = structlog.get_logger(__name__)

FAST, FULL = "fast", "full"
PREPARE, COMMIT, CONFIRM = "prepare", "commit", "confirm"
LOAD = "load"
NO_SNAPSHOT, NO_STORE, NOT_FINITE = "no_snapshot", "no_store", "not_finite"
REFUSED, LATE, FAILED = "refused", "late", "failed"
CONSERVATIVE_SECONDS: Final = 0.5
"""A rollback that took longer leaves the run in conservative mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackConfig:
    """What each phase may take (requirements 3.3)."""

    prepare_ms: Annotated[float, Range(1, 60_000)] = 150.0
    commit_ms: Annotated[float, Range(1, 60_000)] = 250.0
    confirm_ms: Annotated[float, Range(1, 60_000)] = 100.0
    full_prepare_ms: Annotated[float, Range(1, 600_000)] = 2000.0
    full_commit_ms: Annotated[float, Range(1, 600_000)] = 5000.0
    full_seconds: Annotated[float, Range(0.1, 3600)] = 12.0
    """A rollback from the disk, reading included."""
    quorum: Annotated[float, Range(0, 1)] = 0.66
    """The share of the participants that must agree; one of three may be absent."""

    def __post_init__(self) -> None:
        validate(self)


class RollbackOrder(NamedTuple):
    """What a run is to go back to."""

    epoch: int
    step: int
    digest: str
    """Names the checkpoint."""
    reason: str
    severity: EmergencyLevel.ValueType
    state: Mapping[str, Any]
    """What participants of this process restore from, by the name of the part. It is not theirs to keep or change."""
    tier: str = FAST


class Vote(NamedTuple):
    """What a participant says to an order. One that is absent neither agrees nor stands in the way."""

    participant: str
    agrees: bool
    is_absent: bool = False
    reason: str = ""


class Participant(Protocol):
    """Holds a part of the run. Called on the training thread: it must not wait for anybody.

    What one of these calls raises is a failure of the phase, and the rollback is tried with an older checkpoint.
    """

    name: str

    def prepare(self, order: RollbackOrder) -> Vote:
        """Say whether it can go back to this; change nothing."""
        ...

    def commit(self, order: RollbackOrder) -> None:
        """Go back."""
        ...

    def confirm(self, order: RollbackOrder) -> None:
        """Check that it is there, or tell others that it is."""
        ...

    def abort(self) -> None:
        """Forget the order. What was committed is restored again from another checkpoint."""
        ...


class Failure(NamedTuple):
    """Why a tier did not succeed."""

    tier: str
    phase: str
    reason: str
    """A stable word."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RollbackResult:
    """What became of a rollback."""

    reason: str
    severity: EmergencyLevel.ValueType
    tier: str = ""
    """`fast` or `full`; empty when the run could not be taken back."""
    epoch: int = 0
    step: int = 0
    digest: str = ""
    elapsed_ms: float = 0.0
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    """By tier and phase, for example `fast.commit`."""
    votes: tuple[Vote, ...] = ()
    failures: tuple[Failure, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    """Checkpoints that could not be used."""
    is_late: bool = False
    """Whether it came back, but the deadline of the full rollback had passed."""
    has_changed: bool = False
    """Whether a failed one may have left the model between two states."""

    @property
    def succeeded(self) -> bool:
        """Whether the run is where it should be."""
        return bool(self.tier)

    @property
    def needs_conservative_mode(self) -> bool:
        """Whether the run should be held back for a while."""
        return self.elapsed_ms > CONSERVATIVE_SECONDS * 1000

    @property
    def needs_halt(self) -> bool:
        """Whether training must stop: it could not be taken back, or not in time."""
        return not self.succeeded or self.is_late


class _PhaseFailed(Exception):
    def __init__(self, phase: str, reason: str, detail: str = "") -> None:
        super().__init__(phase, reason, detail)
        self.phase, self.reason, self.detail = phase, reason, detail


class Rollback:
    """Takes a run back: from memory in half a second, and where that fails from the disk in twelve.

    Participants agree (PREPARE), go back (COMMIT) and check (CONFIRM), each phase within its time. Any failure aborts
    the tier. Call it on the training thread, between two steps.
    """

    def __init__(
        self,
        participants: Sequence[Participant],
        *,
        cache: SnapshotCache,
        store: CheckpointStore | None,
        config: RollbackConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._participants = tuple(participants)
        self._cache = cache
        self._store = store
        self._config = config or RollbackConfig()
        self._clock = clock

    def run(
        self,
        *,
        latest_step: int,
        reason: str,
        severity: EmergencyLevel.ValueType = EmergencyLevel.EMERGENCY_LEVEL_ELEVATED,
        tier: str = FAST,
    ) -> RollbackResult:
        """Go back to the newest checkpoint up to a step. `tier` may be FULL to pass over the memory.

        Raises nothing but OutOfStep, where several ranks train the model and one of them is gone.
        """
        attempt = _Attempt(self._participants, self._config, self._clock, reason, severity)
        if tier == FAST and attempt.succeeds(FAST, lambda: self._fast(attempt, latest_step)):
            return attempt.result
        attempt.succeeds(FULL, lambda: self._full(attempt, latest_step))
        return attempt.result

    def _fast(self, attempt: _Attempt, latest_step: int) -> None:
        config = self._config
        with attempt.phase(PREPARE, config.prepare_ms):
            snapshot = self._cache.find(latest_step)
            if snapshot is None:
                raise _PhaseFailed(PREPARE, NO_SNAPSHOT)
            order = attempt.order(snapshot.epoch, snapshot.step, snapshot.digest, snapshot.state)
            attempt.ask(order)
        with attempt.phase(COMMIT, config.commit_ms):
            attempt.commit(order)
        with attempt.phase(CONFIRM, config.confirm_ms):
            attempt.confirm(order)

    def _full(self, attempt: _Attempt, latest_step: int) -> None:
        config = self._config
        if self._store is None:
            raise _PhaseFailed(LOAD, NO_STORE)
        deadline = _Deadline(self._clock, config.full_seconds)
        with attempt.phase(LOAD, config.full_seconds * 1000):
            loaded = self._store.load(latest_step=latest_step, accept=_why_not, on_chunk=deadline.check)
        attempt.note_skipped(loaded.skipped)
        order = attempt.order(loaded.manifest.epoch, loaded.manifest.step, loaded.manifest.digest, loaded.state)
        with attempt.phase(PREPARE, config.full_prepare_ms):
            attempt.ask(order)
        # From here on it is better late than not at all: what fails now leaves the model between two states.
        with attempt.phase(COMMIT, None):
            attempt.commit(order)
        with attempt.phase(CONFIRM, None):
            attempt.confirm(order)
        attempt.note_late(commit_ms=config.full_commit_ms, is_over=deadline.is_over())


class _Deadline:
    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self._end = clock() + seconds

    def is_over(self) -> bool:
        return self._clock() > self._end

    def check(self) -> None:
        if self.is_over():
            raise DeadlineExceeded(f"A rollback from the disk may take {self._seconds:g} s.")


class _Phase:
    """Times a phase, and fails it when it took too long."""

    def __init__(self, attempt: _Attempt, name: str, limit_ms: float | None) -> None:
        self._attempt, self._name, self._limit_ms = attempt, name, limit_ms

    def __enter__(self) -> None:
        self._begun = self._attempt.clock()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        elapsed_ms = (self._attempt.clock() - self._begun) * 1000
        self._attempt.note_phase(self._name, elapsed_ms)
        if isinstance(error, _PhaseFailed | OutOfStep):
            return
        if isinstance(error, DeadlineExceeded):
            raise _PhaseFailed(self._name, LATE, error.message) from error
        if isinstance(error, Exception):
            raise _PhaseFailed(self._name, _word_of(error), str(error)) from error
        if error is None and self._limit_ms is not None and elapsed_ms > self._limit_ms:
            raise _PhaseFailed(self._name, LATE, f"{elapsed_ms:.0f} of {self._limit_ms:.0f} ms")


class _Attempt:
    """One rollback: what was asked of whom, how long it took, and what came of it."""

    def __init__(
        self,
        participants: Sequence[Participant],
        config: RollbackConfig,
        clock: Callable[[], float],
        reason: str,
        severity: EmergencyLevel.ValueType,
    ) -> None:
        self._participants = participants
        self._config = config
        self.clock = clock
        self.result = RollbackResult(reason=reason, severity=severity)
        self._begun = clock()
        self._tier = ""
        self._phases_ms: dict[str, float] = {}

    def succeeds(self, tier: str, work: Callable[[], None]) -> bool:
        """Try a tier; whether the run is back. On a failure everybody is told to forget the order."""
        self._tier = tier
        try:
            work()
        except _PhaseFailed as failed:
            self._abort(failed)
            return False
        finally:
            self._note(elapsed_ms=(self.clock() - self._begun) * 1000, phases_ms=dict(self._phases_ms))
        self._note(tier=tier, has_changed=False)
        return True

    def phase(self, name: str, limit_ms: float | None) -> _Phase:
        """Time what follows."""
        return _Phase(self, name, limit_ms)

    def order(self, epoch: int, step: int, digest: str, state: Mapping[str, Any]) -> RollbackOrder:
        """Say what to go back to."""
        self._note(epoch=epoch, step=step, digest=digest)
        return RollbackOrder(epoch, step, digest, self.result.reason, self.result.severity, state, self._tier)

    def ask(self, order: RollbackOrder) -> None:
        """Take the votes: nobody may refuse, and enough must be there."""
        votes = tuple(participant.prepare(order) for participant in self._participants)
        self._note(votes=votes)
        refusals = [vote for vote in votes if not vote.agrees and not vote.is_absent]
        if refusals:
            raise _PhaseFailed(PREPARE, REFUSED, f"{refusals[0].participant}: {refusals[0].reason}")
        agreed = sum(vote.agrees for vote in votes)
        if agreed < self._config.quorum * len(votes):
            raise _PhaseFailed(PREPARE, REFUSED, f"{agreed} of {len(votes)} participants are there")

    def commit(self, order: RollbackOrder) -> None:
        """Have everybody go back, in order."""
        self._note(has_changed=True)
        for participant in self._participants:
            participant.commit(order)

    def confirm(self, order: RollbackOrder) -> None:
        """Have everybody check."""
        for participant in self._participants:
            participant.confirm(order)

    def note_phase(self, name: str, elapsed_ms: float) -> None:
        """Keep how long a phase took."""
        self._phases_ms[f"{self._tier}.{name}"] = elapsed_ms

    def note_skipped(self, skipped: tuple[Skipped, ...]) -> None:
        """Keep which checkpoints could not be used."""
        self._note(skipped=skipped)

    def note_late(self, *, commit_ms: float, is_over: bool) -> None:
        """Keep whether the time was over."""
        self._note(is_late=is_over or self._phases_ms[f"{FULL}.{COMMIT}"] > commit_ms)

    def _abort(self, failed: _PhaseFailed) -> None:
        failure = Failure(self._tier, failed.phase, failed.reason, failed.detail)
        log.warning("rollback_aborted", **failure._asdict())
        self._note(failures=(*self.result.failures, failure))
        for participant in self._participants:
            try:
                participant.abort()
            except Exception as error:  # noqa: BLE001  # The next tier restores all of it anyway.
                log.warning("rollback_abort_failed", participant=participant.name, error=str(error))

    def _note(self, **changes: Any) -> None:
        self.result = replace(self.result, **changes)


def _why_not(state: Mapping[str, Any]) -> str:
    return NOT_FINITE if first_not_finite(state) else ""


def _word_of(error: Exception) -> str:
    return error.reason.lower() if isinstance(error, EsperError) else FAILED
