from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from esper_rpc.errors import FailedPrecondition, PermissionDenied, ResourceExhausted
from esper_rpc.proto.leyline.v1 import CircuitState, EmergencyLevel, HealthStatus
from esper_rpc.proto.tolaria.v1 import (
    CreateCheckpointRequest,
    CreateCheckpointResponse,
    GetStatusRequest,
    GetStatusResponse,
    RollbackRequest,
    RollbackResponse,
    SignalEmergencyRequest,
    SignalEmergencyResponse,
    WatchEmergenciesRequest,
    WatchEmergenciesResponse,
    WatchMetricsRequest,
    WatchMetricsResponse,
)
from esper_rpc.safe_point import AtSafePoint, when_safe
from esper_rpc.server import Call

from .checkpoints.keeper import CheckpointKeeper
from .conservative_mode import ConservativeMode
from .emergency.emergencies import LOWERS, Announcement, Emergencies
from .emergency.levels import PUBLISHED_FROM
from .epoch_guard import EpochGuard
from .metrics.feed import MetricsFeed, StepSample

BACKLOG = 256
SAFE_POINT_SECONDS = 5.0
Result = TypeVar("Result")


class Run(Protocol):
    """The run, as far as operators are told of it. A TrainingSession is one."""

    run_id: str
    global_step: int
    epoch: int


class TolariaServicer:
    """Serves the trainer of this process to operators and tools."""

    def __init__(
        self,
        run: Run,
        emergencies: Emergencies,
        *,
        at_safe_point: AtSafePoint,
        mode: ConservativeMode,
        feed: MetricsFeed,
        guard: EpochGuard | None = None,
        checkpoints: CheckpointKeeper | None = None,
        safe_point_seconds: float = SAFE_POINT_SECONDS,
    ) -> None:
        """`at_safe_point` has work done by the training thread, which alone may change the model."""
        self._run = run
        self._emergencies = emergencies
        self._at_safe_point = at_safe_point
        self._mode = mode
        self._feed = feed
        self._guard = guard
        self._checkpoints = checkpoints
        self._safe_point_seconds = safe_point_seconds

    async def GetStatus(self, request: GetStatusRequest, call: Call) -> GetStatusResponse:
        """Return a snapshot."""
        self._require_own(call)
        emergencies = self._emergencies
        response = GetStatusResponse(
            status=self._health(),
            run_id=self._run.run_id,
            audience=emergencies.verifier.audience,
            global_step=self._run.global_step,
            epoch=self._run.epoch,
            is_halted=emergencies.halt.is_engaged,
            allows_remote_halt=emergencies.config.allow_remote_halt,
            conservative_reasons=self._mode.reasons,
            breaker=self._guard.breaker.state if self._guard is not None else CircuitState.CIRCUIT_STATE_UNSPECIFIED,
            shared_signal_problem=emergencies.shared_problem,
            rejections=emergencies.verifier.rejections,
            checkpoints=self._checkpoints.checkpoints() if self._checkpoints is not None else (),
        )
        if emergencies.in_force is not None:
            response.emergency.CopyFrom(emergencies.in_force[0])
        if self._guard is not None and self._guard.last is not None:
            response.epoch_hook.FromNanoseconds(int(self._guard.last.total_ms * 1e6))
        return response

    async def CreateCheckpoint(self, request: CreateCheckpointRequest, call: Call) -> CreateCheckpointResponse:
        """Write a checkpoint at the next safe point."""
        self._require_own(call)
        keeper = self._keeper()
        made = await self._when_safe(lambda: keeper.create_checkpoint(request.reason))
        return CreateCheckpointResponse(checkpoint=made)

    async def Rollback(self, request: RollbackRequest, call: Call) -> RollbackResponse:
        """Return to a checkpoint at the next safe point."""
        self._require_own(call)
        keeper = self._keeper()
        done = await self._when_safe(lambda: keeper.rollback(request.checkpoint, request.tier, request.reason))
        response = RollbackResponse(checkpoint=done.checkpoint, tier=done.tier)
        response.latency.FromNanoseconds(int(done.seconds * 1e9))
        return response

    async def SignalEmergency(self, request: SignalEmergencyRequest, call: Call) -> SignalEmergencyResponse:
        """Verify a signal and act on it."""
        self._require_own(call)
        receipt = self._emergencies.receive(request.signal, peer=str(call.peer))
        return SignalEmergencyResponse(
            accepted=not receipt.reason,
            reason=receipt.reason,
            duplicate=receipt.duplicate,
            level=self._emergencies.level,
            is_halted=self._emergencies.halt.is_engaged,
        )

    async def WatchEmergencies(
        self, request: WatchEmergenciesRequest, call: Call
    ) -> AsyncIterator[WatchEmergenciesResponse]:
        """Stream the emergency in force, then every announcement."""
        self._require_own(call)
        loop, least = asyncio.get_running_loop(), request.least_level or PUBLISHED_FROM
        backlog = _Backlog()
        stop = self._emergencies.listen(lambda found: backlog.hand(loop, found))
        try:
            present = self._emergencies.in_force
            if present is not None and _is_told(present, least):
                yield WatchEmergenciesResponse(signal=present[1])
            while (found := await backlog.take()) is not None:
                if found is not present and _is_told(found, least):
                    yield WatchEmergenciesResponse(signal=found[1])
        finally:
            stop()

    async def WatchMetrics(self, request: WatchMetricsRequest, call: Call) -> AsyncIterator[WatchMetricsResponse]:
        """Stream the metrics of every step from now on."""
        self._require_own(call)
        names = frozenset(request.names)
        async for sample, missed in self._feed.watch(request.every_steps):
            yield _told(sample, names, missed)

    def keep(self, checkpoints: CheckpointKeeper) -> None:
        """Write and return to checkpoints by this keeper from now on."""
        self._checkpoints = checkpoints

    async def close(self) -> None:
        """End those who watch: the run is over."""
        self._emergencies.close()
        self._feed.close()

    def _health(self) -> HealthStatus.ValueType:
        if self._emergencies.halt.is_engaged:
            return HealthStatus.HEALTH_STATUS_CRITICAL
        is_degraded = self._mode.is_active or self._emergencies.is_degraded
        return HealthStatus.HEALTH_STATUS_DEGRADED if is_degraded else HealthStatus.HEALTH_STATUS_HEALTHY

    def _require_own(self, call: Call) -> None:
        # The table admits every trainer; this run is one trainer's.
        own = self._emergencies.verifier.audience
        if call.peer.role == "trainer" and str(call.peer) != own:
            raise PermissionDenied(f"{call.peer} does not train this run; {own} does.")

    def _keeper(self) -> CheckpointKeeper:
        if self._checkpoints is None:
            raise FailedPrecondition("This trainer keeps no checkpoints.", reason="NO_CHECKPOINTS")
        return self._checkpoints

    async def _when_safe(self, work: Callable[[], Result]) -> Result:
        return await when_safe(self._at_safe_point, work, seconds=self._safe_point_seconds)


def _is_told(found: Announcement, least: EmergencyLevel.ValueType) -> bool:
    return found[0].level >= least or LOWERS in found[0].attributes


def _told(sample: StepSample, names: frozenset[str], missed: int) -> WatchMetricsResponse:
    chosen = {name: value for name, value in sample.metrics.items() if not names or name in names}
    response = WatchMetricsResponse(global_step=sample.global_step, epoch=sample.epoch, metrics=chosen, missed=missed)
    response.ended_at.FromNanoseconds(sample.ended_at_ns)
    return response


class _Backlog:
    """What a reader has not read yet. One that falls too far behind is ended."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Announcement | None] = asyncio.Queue()
        self._is_overrun = False

    def hand(self, loop: asyncio.AbstractEventLoop, found: Announcement | None) -> None:
        """Leave an announcement, from any thread."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._put, found)

    async def take(self) -> Announcement | None:
        """Return the next one; raises ResourceExhausted when some were lost."""
        found = await self._waiting.get()
        if self._is_overrun:
            raise ResourceExhausted(f"The reader is more than {BACKLOG} signals behind; watch again.")
        return found

    def _put(self, found: Announcement | None) -> None:
        self._is_overrun |= self._waiting.qsize() >= BACKLOG
        if not self._is_overrun:
            self._waiting.put_nowait(found)
