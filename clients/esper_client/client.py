"""Typed asyncio clients: one class per service, one method per RPC, errors of esper_rpc.errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Protocol, Self, TypeVar

from esper_rpc.channel import ForkGuard, open_channel, retry_config

import grpc  # isort: skip  # After channel, which sets how grpc behaves around forks.

from esper_rpc.breaker import BreakerConfig, CircuitBreaker
from esper_rpc.errors import DeadlineExceeded, Internal, Unavailable
from esper_rpc.identity import Identity, LiveIdentity
from esper_rpc.proto.identity.v1 import (
    EnrollRequest,
    EnrollResponse,
    RenewCertificateRequest,
    RenewCertificateResponse,
)
from esper_rpc.proto.kasmina.v1 import (
    AdvanceAlphaRequest,
    AdvanceAlphaResponse,
    ApplyCommandRequest,
    ApplyCommandResponse,
    ExportSeedStatesRequest,
    ExportSeedStatesResponse,
    FinalizeStepRequest,
    FinalizeStepResponse,
    UpdateEpochRequest,
    UpdateEpochResponse,
    WatchSeedEventsRequest,
    WatchSeedEventsResponse,
)
from esper_rpc.proto.kasmina.v1 import (
    GetStatusRequest as KasminaStatusRequest,
)
from esper_rpc.proto.kasmina.v1 import (
    GetStatusResponse as KasminaStatusResponse,
)
from esper_rpc.proto.tamiyo.v1 import (
    AckFieldReportRequest,
    AckFieldReportResponse,
    CloseRunRequest,
    CloseRunResponse,
    EvaluateEpochRequest,
    EvaluateEpochResponse,
    EvaluateStepRequest,
    EvaluateStepResponse,
    EvaluateStepsRequest,
    EvaluateStepsResponse,
    ExplainDecisionRequest,
    ExplainDecisionResponse,
    GetPolicyRequest,
    GetPolicyResponse,
    IngestPolicyUpdateRequest,
    IngestPolicyUpdateResponse,
    ListDumpedStepsRequest,
    ListDumpedStepsResponse,
    ListFieldReportsRequest,
    ListFieldReportsResponse,
    ListPauseGrantsRequest,
    ListPauseGrantsResponse,
    ListStepDumpsRequest,
    ListStepDumpsResponse,
    OpenRunRequest,
    OpenRunResponse,
    PublishHistoryRequest,
    PublishHistoryResponse,
    ReplayDecisionRequest,
    ReplayDecisionResponse,
    RequestPauseRequest,
    RequestPauseResponse,
    RollbackPolicyRequest,
    RollbackPolicyResponse,
    SetConservativeModeRequest,
    SetConservativeModeResponse,
)
from esper_rpc.proto.tamiyo.v1 import (
    GetStatusRequest as TamiyoStatusRequest,
)
from esper_rpc.proto.tamiyo.v1 import (
    GetStatusResponse as TamiyoStatusResponse,
)
from esper_rpc.proto.tolaria.v1 import (
    CreateCheckpointRequest,
    CreateCheckpointResponse,
    RollbackRequest,
    RollbackResponse,
    SignalEmergencyRequest,
    SignalEmergencyResponse,
    WatchEmergenciesRequest,
    WatchEmergenciesResponse,
    WatchMetricsRequest,
    WatchMetricsResponse,
)
from esper_rpc.proto.tolaria.v1 import (
    GetStatusRequest as TolariaStatusRequest,
)
from esper_rpc.proto.tolaria.v1 import (
    GetStatusResponse as TolariaStatusResponse,
)
from esper_rpc.proto.urza.v1 import (
    BatchGetExtrasRequest,
    BatchGetExtrasResponse,
    FetchKernelRequest,
    FetchKernelResponse,
    GetBlueprintRequest,
    GetBlueprintResponse,
    GetExtrasRequest,
    GetExtrasResponse,
    ListBlueprintsRequest,
    ListBlueprintsResponse,
    PrefetchRequest,
    PrefetchResponse,
    SaveBlueprintRequest,
    SaveBlueprintResponse,
    UploadKernelRequest,
    UploadKernelResponse,
    WatchCatalogRequest,
    WatchCatalogResponse,
)
from esper_rpc.status import from_rpc_error
from esper_rpc.telemetry.tracing import TRACEPARENT, current_traceparent

from .hedging import Hedge, HedgeConfig

HAND_OVER_SECONDS = 30.0
CLIENT_BREAKER = BreakerConfig(failures=5, cool_down_seconds=5.0, successes=1)
FAILURES = (Unavailable, DeadlineExceeded, Internal)
"""What says that the peer is not well; any other error is an answer."""


class Parsed(Protocol):
    """A generated message class, as far as a client needs it."""

    @classmethod
    def FromString(cls, s: bytes) -> Self:
        """Parse."""
        ...


Response = TypeVar("Response", bound=Parsed)


def _trace_metadata() -> tuple[tuple[str, str], ...] | None:
    traceparent = current_traceparent()
    return ((TRACEPARENT, traceparent),) if traceparent else None


class MeshClient:
    """A channel to one service. Make it on the event loop that uses it; close it there.

    When the identity's files are renewed, the next call goes over a new channel; calls in flight end on the old one.
    """

    role = ""
    service = ""
    retried: tuple[str, ...] = ()
    """Idempotent methods, which gRPC retries when the server is unavailable or pushes back."""

    def __init__(self, address: str, *, identity: Identity, breaker: BreakerConfig = CLIENT_BREAKER) -> None:
        self._fork = ForkGuard()
        self._address = address
        self._live = LiveIdentity(identity)
        self._identity = identity
        self._channel = self._open(identity)
        self._breaker_config = breaker
        self._breakers: dict[str, CircuitBreaker] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        for task in self._closing:
            task.cancel()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _path(self, method: str) -> str:
        self._fork.check()
        self._follow_identity()
        return f"/{self.service}/{method}"

    def _follow_identity(self) -> None:
        current = self._live.current()
        if current is self._identity:
            return
        closing = asyncio.create_task(self._channel.close(HAND_OVER_SECONDS))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._identity = current
        self._channel = self._open(current)

    def _open(self, identity: Identity) -> grpc.aio.Channel:
        return open_channel(
            self._address, identity=identity, role=self.role, service_config=retry_config(self.service, self.retried)
        )

    def _breaker(self, method: str) -> CircuitBreaker:
        """The breaker of this peer and method; raises Unavailable while it is open."""
        breaker = self._breakers.setdefault(method, CircuitBreaker(config=self._breaker_config))
        if not breaker.allow():
            raise Unavailable(
                f"{self.service}/{method} at {self._address} failed too often; it is asked again in"
                f" {self._breaker_config.cool_down_seconds:g} s.",
                reason="BREAKER_OPEN",
            )
        return breaker

    async def _unary(self, method: str, request: Any, response: type[Response], timeout: float) -> Response:
        path, breaker = self._path(method), self._breaker(method)
        call: Any = self._channel.unary_unary(path, type(request).SerializeToString, response.FromString)
        try:
            answer = await call(request, timeout=timeout, metadata=_trace_metadata())
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            (breaker.record_failure if isinstance(error, FAILURES) else breaker.record_success)()
            raise error from rpc_error
        except asyncio.CancelledError:
            breaker.record_success()  # The caller gave up: that says nothing about the peer.
            raise
        breaker.record_success()
        return answer  # type: ignore[no-any-return]  # response.FromString made it.

    async def _upload(
        self, method: str, requests: AsyncIterable[Any], request: Any, response: type[Response], timeout: float
    ) -> Response:
        path = self._path(method)
        call: Any = self._channel.stream_unary(path, request.SerializeToString, response.FromString)(timeout=timeout)
        try:
            # A server that refuses ends the call while we still write; why stands in the call's status.
            with contextlib.suppress(asyncio.InvalidStateError):
                async for part in requests:
                    await call.write(part)
                await call.done_writing()
            return await call  # type: ignore[no-any-return]  # response.FromString made it.
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def _download(
        self, method: str, request: Any, response: type[Response], timeout: float | None
    ) -> AsyncIterator[Response]:
        path = self._path(method)
        call: Any = self._channel.unary_stream(path, type(request).SerializeToString, response.FromString)
        try:
            async for message in call(request, timeout=timeout):
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def _bidi(
        self, method: str, requests: AsyncIterable[Any], request: Any, response: type[Response]
    ) -> AsyncIterator[Response]:
        path = self._path(method)
        call: Any = self._channel.stream_stream(path, request.SerializeToString, response.FromString)
        try:
            async for message in call(requests):
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


class IdentityClient(MeshClient):
    """IdentityService issues certificates to members of the mesh."""

    role = "weatherlight"  # Whoever starts the mesh holds the intermediate.
    service = "esper.identity.v1.IdentityService"

    async def renew_certificate(
        self, request: RenewCertificateRequest, *, timeout: float = 2.0
    ) -> RenewCertificateResponse:
        """Issues a new leaf to the holder of a valid one, with the same names."""
        return await self._unary("RenewCertificate", request, RenewCertificateResponse, timeout)

    async def enroll(self, request: EnrollRequest, *, timeout: float = 2.0) -> EnrollResponse:
        """Issues a first leaf for a one-time token."""
        return await self._unary("Enroll", request, EnrollResponse, timeout)


class KasminaClient(MeshClient):
    """KasminaService is the seed host: it carries out signed commands on a live model."""

    role = "trainer"  # It lives where the tensors are, under the trainer's certificate.
    service = "esper.kasmina.v1.KasminaService"
    retried = ("ApplyCommand", "ExportSeedStates", "GetStatus")  # An envelope that comes twice is applied once.

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

    async def get_status(self, request: KasminaStatusRequest, *, timeout: float = 2.0) -> KasminaStatusResponse:
        """Reports what the host does at present, with what an operator needs to sign a command for it."""
        return await self._unary("GetStatus", request, KasminaStatusResponse, timeout)


class TolariaClient(MeshClient):
    """TolariaService is the trainer of one run: its checkpoints, its emergencies and what it measures."""

    role = "trainer"
    service = "esper.tolaria.v1.TolariaService"
    retried = ("GetStatus", "SignalEmergency")  # A signal that comes twice is acted on once.

    async def get_status(self, request: TolariaStatusRequest, *, timeout: float = 2.0) -> TolariaStatusResponse:
        """Reports how the run does, with what is needed to sign a signal for it."""
        return await self._unary("GetStatus", request, TolariaStatusResponse, timeout)

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


class TamiyoClient(MeshClient):
    """TamiyoService decides what a training run does next."""

    role = "tamiyo"
    service = "esper.tamiyo.v1.TamiyoService"
    # A step that comes twice, with the same sequence and content, is answered again.
    retried = (
        "OpenRun",
        "EvaluateStep",
        "GetPolicy",
        "GetStatus",
        "ExplainDecision",
        "ListPauseGrants",
        "ListFieldReports",
        "ListStepDumps",
        "ListDumpedSteps",
    )

    async def open_run(self, request: OpenRunRequest, *, timeout: float = 2.0) -> OpenRunResponse:
        """Opens a run, or opens it again after a reconnect."""
        return await self._unary("OpenRun", request, OpenRunResponse, timeout)

    async def close_run(self, request: CloseRunRequest, *, timeout: float = 2.0) -> CloseRunResponse:
        """Forgets a run."""
        return await self._unary("CloseRun", request, CloseRunResponse, timeout)

    def evaluate_steps(self, requests: AsyncIterable[EvaluateStepsRequest]) -> AsyncIterator[EvaluateStepsResponse]:
        """Answers steps on one long-lived stream."""
        return self._bidi("EvaluateSteps", requests, EvaluateStepsRequest, EvaluateStepsResponse)

    async def evaluate_step(self, request: EvaluateStepRequest, *, timeout: float = 2.0) -> EvaluateStepResponse:
        """Answers one step: the same decision as on the stream."""
        return await self._unary("EvaluateStep", request, EvaluateStepResponse, timeout)

    async def evaluate_epoch(self, request: EvaluateEpochRequest, *, timeout: float = 2.0) -> EvaluateEpochResponse:
        """Decides at the end of an epoch, with seconds instead of milliseconds to think."""
        return await self._unary("EvaluateEpoch", request, EvaluateEpochResponse, timeout)

    async def ingest_policy_update(
        self, request: IngestPolicyUpdateRequest, *, timeout: float = 120.0
    ) -> IngestPolicyUpdateResponse:
        """Verifies a signed PolicyUpdate and makes it the live policy, or rejects it with a reason."""
        return await self._unary("IngestPolicyUpdate", request, IngestPolicyUpdateResponse, timeout)

    async def get_policy(self, request: GetPolicyRequest, *, timeout: float = 2.0) -> GetPolicyResponse:
        """Describes the policy in force."""
        return await self._unary("GetPolicy", request, GetPolicyResponse, timeout)

    async def rollback_policy(self, request: RollbackPolicyRequest, *, timeout: float = 2.0) -> RollbackPolicyResponse:
        """Returns to the policy that was live before."""
        return await self._unary("RollbackPolicy", request, RollbackPolicyResponse, timeout)

    async def request_pause(self, request: RequestPauseRequest, *, timeout: float = 2.0) -> RequestPauseResponse:
        """Asks for pause units from the caller's quota."""
        return await self._unary("RequestPause", request, RequestPauseResponse, timeout)

    async def list_pause_grants(
        self, request: ListPauseGrantsRequest, *, timeout: float = 2.0
    ) -> ListPauseGrantsResponse:
        """Lists what RequestPause granted and refused, oldest first."""
        return await self._unary("ListPauseGrants", request, ListPauseGrantsResponse, timeout)

    async def set_conservative_mode(
        self, request: SetConservativeModeRequest, *, timeout: float = 2.0
    ) -> SetConservativeModeResponse:
        """Turns conservative mode on or off by hand."""
        return await self._unary("SetConservativeMode", request, SetConservativeModeResponse, timeout)

    async def get_status(self, request: TamiyoStatusRequest, *, timeout: float = 2.0) -> TamiyoStatusResponse:
        """Reports what the service does at present."""
        return await self._unary("GetStatus", request, TamiyoStatusResponse, timeout)

    async def ack_field_report(self, request: AckFieldReportRequest, *, timeout: float = 2.0) -> AckFieldReportResponse:
        """Marks a field report as received."""
        return await self._unary("AckFieldReport", request, AckFieldReportResponse, timeout)

    async def list_field_reports(
        self, request: ListFieldReportsRequest, *, timeout: float = 2.0
    ) -> ListFieldReportsResponse:
        """Lists field reports, oldest first."""
        return await self._unary("ListFieldReports", request, ListFieldReportsResponse, timeout)

    async def publish_history(self, request: PublishHistoryRequest, *, timeout: float = 2.0) -> PublishHistoryResponse:
        """Flushes telemetry and field reports to the message fabric."""
        return await self._unary("PublishHistory", request, PublishHistoryResponse, timeout)

    async def explain_decision(
        self, request: ExplainDecisionRequest, *, timeout: float = 2.0
    ) -> ExplainDecisionResponse:
        """Returns the record of one decision."""
        return await self._unary("ExplainDecision", request, ExplainDecisionResponse, timeout)

    async def replay_decision(self, request: ReplayDecisionRequest, *, timeout: float = 60.0) -> ReplayDecisionResponse:
        """Computes one decision again from its record and compares."""
        return await self._unary("ReplayDecision", request, ReplayDecisionResponse, timeout)

    async def list_step_dumps(self, request: ListStepDumpsRequest, *, timeout: float = 10.0) -> ListStepDumpsResponse:
        """Lists what the flight recorder wrote down because of events of priority HIGH and CRITICAL, oldest first."""
        return await self._unary("ListStepDumps", request, ListStepDumpsResponse, timeout)

    async def list_dumped_steps(
        self, request: ListDumpedStepsRequest, *, timeout: float = 10.0
    ) -> ListDumpedStepsResponse:
        """Lists the steps of one dump, oldest first."""
        return await self._unary("ListDumpedSteps", request, ListDumpedStepsResponse, timeout)


class UrzaClient(MeshClient):
    """UrzaService is the library of blueprints and their kernels."""

    role = "urza"
    service = "esper.urza.v1.UrzaService"
    retried = ("GetBlueprint", "GetExtras", "BatchGetExtras", "ListBlueprints")

    def __init__(
        self,
        address: str,
        *,
        identity: Identity,
        breaker: BreakerConfig = CLIENT_BREAKER,
        hedge: HedgeConfig | None = None,
    ) -> None:
        super().__init__(address, identity=identity, breaker=breaker)
        self.hedge = Hedge(hedge)

    async def get_blueprint(self, request: GetBlueprintRequest, *, timeout: float = 2.0) -> GetBlueprintResponse:
        """Returns one blueprint."""
        return await self.hedge.first(lambda: self._unary("GetBlueprint", request, GetBlueprintResponse, timeout))

    async def get_extras(self, request: GetExtrasRequest, *, timeout: float = 2.0) -> GetExtrasResponse:
        """Returns the extras of one blueprint."""
        return await self.hedge.first(lambda: self._unary("GetExtras", request, GetExtrasResponse, timeout))

    async def batch_get_extras(self, request: BatchGetExtrasRequest, *, timeout: float = 2.0) -> BatchGetExtrasResponse:
        """Returns the extras of several blueprints; unknown ones are named, not refused."""
        return await self.hedge.first(lambda: self._unary("BatchGetExtras", request, BatchGetExtrasResponse, timeout))

    async def list_blueprints(self, request: ListBlueprintsRequest, *, timeout: float = 2.0) -> ListBlueprintsResponse:
        """Lists blueprints by identifier."""
        return await self.hedge.first(lambda: self._unary("ListBlueprints", request, ListBlueprintsResponse, timeout))

    async def save_blueprint(self, request: SaveBlueprintRequest, *, timeout: float = 2.0) -> SaveBlueprintResponse:
        """Saves a blueprint with its extras."""
        return await self._unary("SaveBlueprint", request, SaveBlueprintResponse, timeout)

    async def upload_kernel(
        self, requests: AsyncIterable[UploadKernelRequest], *, timeout: float = 60.0
    ) -> UploadKernelResponse:
        """Uploads the kernel of a saved blueprint."""
        return await self._upload("UploadKernel", requests, UploadKernelRequest, UploadKernelResponse, timeout)

    def fetch_kernel(
        self, request: FetchKernelRequest, *, timeout: float | None = None
    ) -> AsyncIterator[FetchKernelResponse]:
        """Downloads a kernel: one header, then chunks in order."""
        return self._download("FetchKernel", request, FetchKernelResponse, timeout)

    async def prefetch(self, request: PrefetchRequest, *, timeout: float = 2.0) -> PrefetchResponse:
        """Makes a kernel ready to be fetched fast and tells its reference, or why it cannot."""
        return await self._unary("Prefetch", request, PrefetchResponse, timeout)

    def watch_catalog(
        self, request: WatchCatalogRequest, *, timeout: float | None = None
    ) -> AsyncIterator[WatchCatalogResponse]:
        """Streams changes of the catalogue."""
        return self._download("WatchCatalog", request, WatchCatalogResponse, timeout)
