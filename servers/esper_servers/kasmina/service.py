from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from esper_rpc.errors import FailedPrecondition, ResourceExhausted
from esper_rpc.proto.kasmina.v1 import (
    AdvanceAlphaRequest,
    AdvanceAlphaResponse,
    ApplyCommandRequest,
    ApplyCommandResponse,
    ExportSeedStatesRequest,
    ExportSeedStatesResponse,
    FinalizeStepRequest,
    FinalizeStepResponse,
    GetStatusRequest,
    GetStatusResponse,
    IssuerFence,
    SeedEvent,
    UpdateEpochRequest,
    UpdateEpochResponse,
    WatchSeedEventsRequest,
    WatchSeedEventsResponse,
)
from esper_rpc.proto.leyline.v1 import HealthStatus, TelemetryPacket
from esper_rpc.server import Call

from .host import InProcessSeedHost

BACKLOG = 1024
SAFE_POINT_SECONDS = 1.5


class KasminaServicer:
    """Serves the seed host of this process to operators, tools and remote loops."""

    def __init__(self, host: InProcessSeedHost, run_id: str) -> None:
        self._host = host
        self._run_id = run_id

    async def ApplyCommand(self, request: ApplyCommandRequest, call: Call) -> ApplyCommandResponse:
        """Verify a command and queue it."""
        outcome, duplicate = self._host.receive(request.command)
        return ApplyCommandResponse(outcome=outcome, duplicate=duplicate)

    async def ExportSeedStates(self, request: ExportSeedStatesRequest, call: Call) -> ExportSeedStatesResponse:
        """Return every seed."""
        return ExportSeedStatesResponse(seeds=self._host.export_seed_states())

    async def AdvanceAlpha(self, request: AdvanceAlphaRequest, call: Call) -> AdvanceAlphaResponse:
        """Move one alpha on."""
        return AdvanceAlphaResponse(alpha=await self._at_safe_point(lambda: self._host.advance_alpha(request.seed_id)))

    async def FinalizeStep(self, request: FinalizeStepRequest, call: Call) -> FinalizeStepResponse:
        """End a step."""
        return FinalizeStepResponse(packets=await self._at_safe_point(lambda: self._end_step(request.step_index)))

    async def UpdateEpoch(self, request: UpdateEpochRequest, call: Call) -> UpdateEpochResponse:
        """Begin an epoch."""
        self._host.update_epoch(request.epoch)
        return UpdateEpochResponse()

    async def WatchSeedEvents(
        self, request: WatchSeedEventsRequest, call: Call
    ) -> AsyncIterator[WatchSeedEventsResponse]:
        """Stream the present stages, then every event."""
        loop, wanted = asyncio.get_running_loop(), frozenset(request.seed_ids)
        queue: asyncio.Queue[SeedEvent | None] = asyncio.Queue()
        stop = self._host.listen(lambda event: _hand(loop, queue, event))
        try:
            for slot in list(self._host.seeds.values()):
                if not wanted or slot.seed_id in wanted:
                    present = SeedEvent(
                        seed_id=slot.seed_id, from_stage=slot.stage, to_stage=slot.stage, reason="present"
                    )
                    yield WatchSeedEventsResponse(event=present)
            while (event := await queue.get()) is not None:
                if queue.qsize() > BACKLOG:
                    raise ResourceExhausted(f"The reader is more than {BACKLOG} events behind; watch again.")
                if not wanted or event.seed_id in wanted:
                    yield WatchSeedEventsResponse(event=event)
        finally:
            stop()

    async def GetStatus(self, request: GetStatusRequest, call: Call) -> GetStatusResponse:
        """Return a snapshot, with the challenge that a command must carry."""
        host = self._host
        return GetStatusResponse(
            status=HealthStatus.HEALTH_STATUS_HEALTHY,
            run_id=self._run_id,
            receiver_epoch=host.receiver_epoch,
            audience=host.verifier.audience,
            global_step=host.global_step,
            queued_commands=host.queued_commands,
            fences=[IssuerFence(issuer=i, sequence=s) for i, s in sorted(host.verifier.fences().items())],
            outcomes=host.recent_outcomes,
            rejections=host.verifier.rejections,
            seeds=host.export_seed_states(),
        )

    def _end_step(self, step_index: int) -> list[TelemetryPacket]:
        self._host.apply_pending()
        return self._host.finalize_step(step_index)

    async def _at_safe_point(self, work: Callable[[], Any]) -> Any:
        done = asyncio.wrap_future(self._host.at_safe_point(work))
        try:
            return await asyncio.wait_for(done, SAFE_POINT_SECONDS)
        except TimeoutError:
            raise FailedPrecondition("No safe point came: the training loop of this host stands still.") from None


def _hand(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[SeedEvent | None], event: SeedEvent | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, event)
