from __future__ import annotations

from collections.abc import AsyncIterator

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
    GetRollbackPayloadRequest,
    GetRollbackPayloadResponse,
    GetStatusRequest,
    GetStatusResponse,
    TerminateSeedRequest,
    TerminateSeedResponse,
    UpdateEpochRequest,
    UpdateEpochResponse,
    ValidateParametersRequest,
    ValidateParametersResponse,
    WatchSeedEventsRequest,
    WatchSeedEventsResponse,
)

from .mesh_client import MeshClient


class KasminaClient(MeshClient):
    """KasminaService is the seed host: it carries out signed commands on a live model."""

    role = "trainer"  # It lives where the tensors are, under the trainer's certificate.
    service = "esper.kasmina.v1.KasminaService"
    # An envelope that comes twice is applied once.
    retried = ("ApplyCommand", "ExportSeedStates", "GetStatus", "ValidateParameters", "GetRollbackPayload",
               "TerminateSeed", "EmergencyCleanup")  # fmt: skip

    async def apply_command(self, request: ApplyCommandRequest, *, timeout: float = 2.0) -> ApplyCommandResponse:
        """Verifies a command and queues it for the next safe point of the training loop."""
        return await self._unary("ApplyCommand", request, ApplyCommandResponse, timeout)

    async def export_seed_states(
        self, request: ExportSeedStatesRequest, *, timeout: float = 2.0
    ) -> ExportSeedStatesResponse:
        """Returns the state of every seed."""
        return await self._unary("ExportSeedStates", request, ExportSeedStatesResponse, timeout)

    async def advance_alpha(self, request: AdvanceAlphaRequest, *, timeout: float = 2.0) -> AdvanceAlphaResponse:
        """Moves the alpha of a blending seed one step on."""
        return await self._unary("AdvanceAlpha", request, AdvanceAlphaResponse, timeout)

    async def finalize_step(self, request: FinalizeStepRequest, *, timeout: float = 2.0) -> FinalizeStepResponse:
        """Ends one training step: steps the seeds' optimizers and flushes their packets."""
        return await self._unary("FinalizeStep", request, FinalizeStepResponse, timeout)

    async def update_epoch(self, request: UpdateEpochRequest, *, timeout: float = 2.0) -> UpdateEpochResponse:
        """Tells the host that an epoch ended."""
        return await self._unary("UpdateEpoch", request, UpdateEpochResponse, timeout)

    def watch_seed_events(
        self, request: WatchSeedEventsRequest, *, timeout: float | None = None
    ) -> AsyncIterator[WatchSeedEventsResponse]:
        """Streams what happens to seeds."""
        return self._download("WatchSeedEvents", request, WatchSeedEventsResponse, timeout)

    async def get_status(self, request: GetStatusRequest, *, timeout: float = 2.0) -> GetStatusResponse:
        """Reports what the host does at present, with what an operator needs to sign a command for it."""
        return await self._unary("GetStatus", request, GetStatusResponse, timeout)

    async def validate_parameters(
        self, request: ValidateParametersRequest, *, timeout: float = 2.0
    ) -> ValidateParametersResponse:
        """Tells which of the parameters that are named a seed may not write to, and whose they are."""
        return await self._unary("ValidateParameters", request, ValidateParametersResponse, timeout)

    async def get_rollback_payload(
        self, request: GetRollbackPayloadRequest, *, timeout: float = 2.0
    ) -> GetRollbackPayloadResponse:
        """Returns what is known of the last seed that was taken out of a place, and how to go back to before it."""
        return await self._unary("GetRollbackPayload", request, GetRollbackPayloadResponse, timeout)

    async def terminate_seed(self, request: TerminateSeedRequest, *, timeout: float = 2.0) -> TerminateSeedResponse:
        """Takes a seed out for good, at the next safe point."""
        return await self._unary("TerminateSeed", request, TerminateSeedResponse, timeout)

    async def emergency_cleanup(
        self, request: EmergencyCleanupRequest, *, timeout: float = 30.0
    ) -> EmergencyCleanupResponse:
        """Lets go of all that can be had again, at the next safe point."""
        return await self._unary("EmergencyCleanup", request, EmergencyCleanupResponse, timeout)
