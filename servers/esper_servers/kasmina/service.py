from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from esper_rpc.errors import PermissionDenied, ResourceExhausted
from esper_rpc.proto.kasmina.v1 import (
    AdvanceAlphaRequest,
    AdvanceAlphaResponse,
    ApplyCommandRequest,
    ApplyCommandResponse,
    EmergencyCleanupRequest,
    EmergencyCleanupResponse,
    ExportSeedStatesRequest,
    ExportSeedStatesResponse,
    FinalizeStepRequest,
    FinalizeStepResponse,
    ForeignParameter,
    GetRollbackPayloadRequest,
    GetRollbackPayloadResponse,
    GetStatusRequest,
    GetStatusResponse,
    IssuerFence,
    SeedEvent,
    TerminateSeedRequest,
    TerminateSeedResponse,
    UpdateEpochRequest,
    UpdateEpochResponse,
    ValidateParametersRequest,
    ValidateParametersResponse,
    WatchSeedEventsRequest,
    WatchSeedEventsResponse,
)
from esper_rpc.safe_point import when_safe
from esper_rpc.server import Call

from .host import InProcessSeedHost

BACKLOG = 1024
SAFE_POINT_SECONDS = 1.5
CLEANUP_SECONDS = 5.0
Result = TypeVar("Result")


class KasminaServicer:
    """Serves the seed host of this process to operators, tools and remote loops."""

    def __init__(self, host: InProcessSeedHost, run_id: str) -> None:
        self._host = host
        self._run_id = run_id

    async def ApplyCommand(self, request: ApplyCommandRequest, call: Call) -> ApplyCommandResponse:
        """Verify a command and queue it."""
        if request.HasField("issuer_time_ns") and self._drives(call):
            self._host.set_clock_offset(request.issuer_time_ns - time.monotonic_ns())
        is_answer = request.HasField("expected_sequence")
        outcome, duplicate = self._host.receive(
            request.command,
            expected_sequence=request.expected_sequence if is_answer else None,
            request_digest=request.request_digest if is_answer else None,
        )
        return ApplyCommandResponse(outcome=outcome, duplicate=duplicate)

    async def ExportSeedStates(self, request: ExportSeedStatesRequest, call: Call) -> ExportSeedStatesResponse:
        """Return every seed."""
        return ExportSeedStatesResponse(seeds=self._host.export_seed_states())

    async def AdvanceAlpha(self, request: AdvanceAlphaRequest, call: Call) -> AdvanceAlphaResponse:
        """Move one alpha on."""
        self._require_driver(call)
        return AdvanceAlphaResponse(alpha=await self._at_safe_point(lambda: self._host.advance_alpha(request.seed_id)))

    async def FinalizeStep(self, request: FinalizeStepRequest, call: Call) -> FinalizeStepResponse:
        """End a step."""
        self._require_driver(call)
        return await self._at_safe_point(lambda: self._end_step(request))

    async def UpdateEpoch(self, request: UpdateEpochRequest, call: Call) -> UpdateEpochResponse:
        """Begin an epoch."""
        self._require_driver(call)
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
        response = GetStatusResponse(
            status=host.health().status,
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
        if request.include_model:
            model = host.describe()
            response.host_topology = model.host_topology
            response.sites.extend(model.sites)
            response.run_seeds.extend(model.seeds)
        return response

    async def ValidateParameters(self, request: ValidateParametersRequest, call: Call) -> ValidateParametersResponse:
        """Look whose parameters are."""
        self._require_driver(call)
        found = self._host.foreign_parameters(request.seed_id, request.parameter_names)
        violations = [ForeignParameter(parameter_name=name, owner=owner) for name, owner in found]
        return ValidateParametersResponse(violations=violations)

    async def GetRollbackPayload(self, request: GetRollbackPayloadRequest, call: Call) -> GetRollbackPayloadResponse:
        """Return what is known of a seed that was taken out."""
        self._require_driver(call)
        return GetRollbackPayloadResponse(rollback=self._host.rollback_payload(request.seed_id))

    async def TerminateSeed(self, request: TerminateSeedRequest, call: Call) -> TerminateSeedResponse:
        """Take a seed out for good."""
        before = await self._at_safe_point(lambda: self._host.terminate(request.seed_id))
        return TerminateSeedResponse(from_stage=before)

    async def EmergencyCleanup(self, request: EmergencyCleanupRequest, call: Call) -> EmergencyCleanupResponse:
        """Let go of what can be had again."""
        return EmergencyCleanupResponse(freed=await self._at_safe_point(self._host.emergency_cleanup, CLEANUP_SECONDS))

    def _drives(self, call: Call) -> bool:
        return str(call.peer) == self._host.verifier.audience

    def _require_driver(self, call: Call) -> None:
        # The table admits every trainer; what moves this model is for its own.
        if not self._drives(call) and call.peer.role != "operator":
            raise PermissionDenied(f"{call.peer} does not drive this host; {self._host.verifier.audience} does.")

    def _end_step(self, request: FinalizeStepRequest) -> FinalizeStepResponse:
        host = self._host
        if request.HasField("loss"):
            host.observe(request.loss, request.step_index)
        host.apply_pending()
        if request.advance_alphas:
            host.advance_alphas()
        return FinalizeStepResponse(
            packets=host.finalize_step(request.step_index),
            seeds=host.export_seed_states(),
            outcomes=host.outcomes_of(request.awaited_commands),
            receiver_epoch=host.receiver_epoch,
        )

    async def _at_safe_point(self, work: Callable[[], Result], seconds: float = SAFE_POINT_SECONDS) -> Result:
        return await when_safe(self._host.at_safe_point, work, seconds=seconds)


def _hand(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[SeedEvent | None], event: SeedEvent | None) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, event)
