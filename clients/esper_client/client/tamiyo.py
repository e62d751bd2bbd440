from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

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
    GetStatusRequest,
    GetStatusResponse,
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

from .mesh_client import MeshClient


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

    async def get_status(self, request: GetStatusRequest, *, timeout: float = 2.0) -> GetStatusResponse:
        """Reports what the service does at present."""
        return await self._unary("GetStatus", request, GetStatusResponse, timeout)

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
