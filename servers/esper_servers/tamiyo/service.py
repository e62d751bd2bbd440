from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from google.protobuf.timestamp_pb2 import Timestamp

from esper_rpc.errors import InvalidRequest
from esper_rpc.proto.tamiyo.v1 import (
    AckFieldReportRequest,
    AckFieldReportResponse,
    ExplainDecisionRequest,
    ExplainDecisionResponse,
    GetPolicyRequest,
    GetPolicyResponse,
    GetStatusRequest,
    GetStatusResponse,
    ListDumpedStepsRequest,
    ListDumpedStepsResponse,
    ListFieldReportsRequest,
    ListFieldReportsResponse,
    ListPauseGrantsRequest,
    ListPauseGrantsResponse,
    ListStepDumpsRequest,
    ListStepDumpsResponse,
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
from esper_rpc.server import Call
from esper_servers.policy.policy import ARCHITECTURE_VERSION

from .blueprint_cache import BlueprintCache
from .field_reports.reports import FieldReports
from .pauses.pauses import Pauses
from .pipeline import StepPipeline
from .policy_updates.updates import PolicyUpdates
from .records.decisions import DecisionLog
from .records.evidence import key_of_step
from .records.step_dumps import StepDumps
from .status import merged, status_of
from .step_processes.held_runs import HeldRuns
from .step_processes.peers import StepPeers
from .step_processes.run_directory import RunDirectory
from .step_service import StepServicer

DEFAULT_PAGE = 100
RAW_METHODS = frozenset({"EvaluateEpoch", "EvaluateStep", "EvaluateSteps", "IngestPolicyUpdate"})


class TamiyoServicer(StepServicer):
    """Serves steps, and what operators ask about them in whichever process they are answered."""

    def __init__(
        self,
        *,
        pipeline: StepPipeline,
        blueprints: BlueprintCache,
        decisions: DecisionLog,
        pauses: Pauses,
        updates: PolicyUpdates,
        replay: Callable[[str], Awaitable[list[str]]],
        reports: FieldReports,
        dumps: StepDumps,
        directory: RunDirectory | None = None,
        others: StepPeers | None = None,
    ) -> None:
        """`replay` says what of a decision comes out otherwise than recorded."""
        self._directory = directory or RunDirectory()
        self._others = StepPeers() if others is None else others
        super().__init__(pipeline, HeldRuns(pipeline, blueprints, self._directory.seen_by))
        self._blueprints = blueprints
        self._decisions = decisions
        self._pauses = pauses
        self._updates = updates
        self._replay = replay
        self._reports = reports
        self._dumps = dumps
        self._started = time.monotonic()

    async def IngestPolicyUpdate(self, raw: bytes, call: Call) -> bytes:
        """Make a signed policy the live one, or follow with it as a shadow, or say why not."""
        return (await self._updates.ingest(raw)).SerializeToString()

    async def RollbackPolicy(self, request: RollbackPolicyRequest, call: Call) -> RollbackPolicyResponse:
        """Return to the policy before, or say which that is."""
        version = await self._updates.roll_back(request.reason, validate_only=request.validate_only)
        return RollbackPolicyResponse(policy_version=version)

    async def GetPolicy(self, request: GetPolicyRequest, call: Call) -> GetPolicyResponse:
        """Describe the policy in force."""
        policy, shadow = self._pipeline.policy, self._updates.shadow
        live_since = Timestamp()
        live_since.FromNanoseconds(self._updates.live_since_ns)
        return GetPolicyResponse(
            policy_version=policy.version,
            architecture_version=ARCHITECTURE_VERSION,
            policy_digest=policy.digest,
            origin=policy.origin,
            plan=policy.plan,
            parameter_count=policy.parameter_count,
            live_since=live_since,
            previous_versions=self._updates.previous,
            shadow_version=shadow.entry.version if shadow.entry else "",
            shadow_compared=shadow.compared,
            shadow_disagreed=shadow.disagreed,
        )

    async def RequestPause(self, request: RequestPauseRequest, call: Call) -> RequestPauseResponse:
        """Grant what the caller's quota holds; an operator may ask for any run, from a quota of its own."""
        self._check_run(request.run_id, call)
        return await self._pauses.request(str(call.peer), request.run_id, request.units, request.reason)

    async def ListPauseGrants(self, request: ListPauseGrantsRequest, call: Call) -> ListPauseGrantsResponse:
        """Return a page of the audit trail."""
        grants, more = await self._pauses.page(request.page_size or DEFAULT_PAGE, request.page_token)
        return ListPauseGrantsResponse(grants=grants, next_page_token=more)

    async def SetConservativeMode(self, request: SetConservativeModeRequest, call: Call) -> SetConservativeModeResponse:
        """Turn conservative mode on or off by hand."""
        self._pipeline.set_conservative_mode(enabled=request.enabled, reason=request.reason)
        self._others.set_conservative_mode(request)
        return SetConservativeModeResponse(enabled=self._pipeline.mode.enabled)

    async def GetStatus(self, request: GetStatusRequest, call: Call) -> GetStatusResponse:
        """Return a snapshot."""
        own = status_of(self._pipeline, self._blueprints)
        status = merged([own, *await self._others.statuses()])
        status.uptime_seconds = time.monotonic() - self._started
        return status

    async def AckFieldReport(self, request: AckFieldReportRequest, call: Call) -> AckFieldReportResponse:
        """Note that a report arrived; when this returns it is on the disk."""
        await self._report_all()
        known = await self._reports.acknowledge(request.report_id)
        return AckFieldReportResponse(already_acknowledged=known)

    async def ListFieldReports(self, request: ListFieldReportsRequest, call: Call) -> ListFieldReportsResponse:
        """Return a page of the reports in the journal, acknowledged or not."""
        await self._report_all()
        reports, more = await self._reports.page(request.page_size or DEFAULT_PAGE, request.page_token)
        return ListFieldReportsResponse(reports=reports, next_page_token=more)

    async def PublishHistory(self, request: PublishHistoryRequest, call: Call) -> PublishHistoryResponse:
        """Hand over what is due now; there is no publisher of telemetry."""
        await self._report_all()
        return PublishHistoryResponse(field_reports=await self._reports.flush())

    async def ExplainDecision(self, request: ExplainDecisionRequest, call: Call) -> ExplainDecisionResponse:
        """Return the record of a decision."""
        await self._report_all()
        return await asyncio.to_thread(self._decisions.explain, _key_of(request))

    async def ReplayDecision(self, request: ReplayDecisionRequest, call: Call) -> ReplayDecisionResponse:
        """Decide again from the record, beside the steps."""
        await self._report_all()
        found = await self._replay(_key_of(request))
        return ReplayDecisionResponse(identical=not found, differences=found)

    async def ListStepDumps(self, request: ListStepDumpsRequest, call: Call) -> ListStepDumpsResponse:
        """Return a page of what was written down of the last steps; first write what is due."""
        await self._report_all()
        dumps, more = await self._dumps.page(request.page_size or DEFAULT_PAGE, request.page_token)
        return ListStepDumpsResponse(dumps=dumps, next_page_token=more)

    async def ListDumpedSteps(self, request: ListDumpedStepsRequest, call: Call) -> ListDumpedStepsResponse:
        """Return a page of the steps of a dump."""
        size = request.page_size or DEFAULT_PAGE
        steps, more = await self._dumps.steps(request.dump_id, size, request.page_token)
        return ListDumpedStepsResponse(steps=steps, next_page_token=more)

    async def _report_all(self) -> None:
        """Have everything that was answered so far on its way to the journal, whichever process answered."""
        self._pipeline.report()
        await self._others.report()

    def _check_run(self, run_id: str, call: Call) -> None:
        """Raise NotFound, or PermissionDenied for another's run."""
        self._directory.check(run_id, None if call.peer.role == "operator" else str(call.peer))

    def begin_drain(self) -> None:
        """Ask every stream to go elsewhere, in every process."""
        super().begin_drain()
        self._others.begin_drain()


def _key_of(request: ExplainDecisionRequest | ReplayDecisionRequest) -> str:
    if request.command_id:
        return request.command_id
    if not request.run_id or not request.sequence:
        raise InvalidRequest("Name a command, or a run and the sequence of one of its steps.")
    return key_of_step(request.run_id, request.sequence)
