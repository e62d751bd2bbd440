from __future__ import annotations

from collections.abc import AsyncIterator

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

from .mesh_client import MeshClient


class TolariaClient(MeshClient):
    """TolariaService is the trainer of one run: its checkpoints, its emergencies and what it measures."""

    role = "trainer"
    service = "esper.tolaria.v1.TolariaService"
    retried = ("GetStatus", "SignalEmergency")  # A signal that comes twice is acted on once.

    async def get_status(self, request: GetStatusRequest, *, timeout: float = 2.0) -> GetStatusResponse:
        """Reports how the run does, with what is needed to sign a signal for it."""
        return await self._unary("GetStatus", request, GetStatusResponse, timeout)

    async def create_checkpoint(
        self, request: CreateCheckpointRequest, *, timeout: float = 30.0
    ) -> CreateCheckpointResponse:
        """Writes a checkpoint at the next safe point of the training loop."""
        return await self._unary("CreateCheckpoint", request, CreateCheckpointResponse, timeout)

    async def rollback(self, request: RollbackRequest, *, timeout: float = 30.0) -> RollbackResponse:
        """Returns the run to a checkpoint at the next safe point."""
        return await self._unary("Rollback", request, RollbackResponse, timeout)

    async def signal_emergency(
        self, request: SignalEmergencyRequest, *, timeout: float = 2.0
    ) -> SignalEmergencyResponse:
        """Verifies a signal and acts on it at once."""
        return await self._unary("SignalEmergency", request, SignalEmergencyResponse, timeout)

    def watch_emergencies(
        self, request: WatchEmergenciesRequest, *, timeout: float | None = None
    ) -> AsyncIterator[WatchEmergenciesResponse]:
        """Streams the emergencies of the run as this trainer announces them."""
        return self._download("WatchEmergencies", request, WatchEmergenciesResponse, timeout)

    def watch_metrics(
        self, request: WatchMetricsRequest, *, timeout: float | None = None
    ) -> AsyncIterator[WatchMetricsResponse]:
        """Streams the metrics of steps, in order."""
        return self._download("WatchMetrics", request, WatchMetricsResponse, timeout)
