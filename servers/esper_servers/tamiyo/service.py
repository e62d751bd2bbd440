from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from google.protobuf.timestamp_pb2 import Timestamp

from esper_rpc.deferred import Deferred
from esper_rpc.errors import FailedPrecondition, InvalidRequest
from esper_rpc.inbox import Inbox
from esper_rpc.proto.leyline.v1 import CircuitState, HealthStatus
from esper_rpc.proto.tamiyo.v1 import (
    AckFieldReportRequest,
    AckFieldReportResponse,
    BreakerStatus,
    CloseRunRequest,
    CloseRunResponse,
    EvaluateStepsResponse,
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
    RunStatus,
    SetConservativeModeRequest,
    SetConservativeModeResponse,
    StepDecision,
)
from esper_rpc.server import Call
from esper_servers.policy.policy import ARCHITECTURE_VERSION

from .blueprint_cache import BlueprintCache
from .conservative_mode import ConservativeMode
from .field_reports.reports import FieldReports
from .giving_way import giving_way
from .pauses.pauses import Pauses
from .pipeline import StepPipeline
from .policy_updates.updates import PolicyUpdates
from .records.decisions import DecisionLog
from .records.evidence import key_of_step
from .records.step_dumps import StepDumps
from .run_state import build_graph

PROTOCOL_VERSIONS = frozenset({1, 2})
"""1: steps and decisions. 2: also the greeting, `going_away` and the pushback of an overloaded server."""
FEATURES = frozenset({"seed", "pause", "optimizer"})
REPORTING_DELAY_SECONDS = 0.005
"""The answer of a unary call leaves after its handler returned, and need not wait for the report on it."""
DEFAULT_PAGE = 100
RAW_METHODS = frozenset({"EvaluateEpoch", "EvaluateStep", "EvaluateSteps", "IngestPolicyUpdate"})
FAREWELL = EvaluateStepsResponse(decision=StepDecision(going_away=True)).SerializeToString()


class TamiyoServicer:
    """Serves a StepPipeline and what operators ask about it."""

    def __init__(
        self,
        *,
        pipeline: StepPipeline,
        blueprints: BlueprintCache,
        decisions: DecisionLog,
        mode: ConservativeMode,
        pauses: Pauses,
        updates: PolicyUpdates,
        replay: Callable[[str], Awaitable[list[str]]],
        reports: FieldReports,
        dumps: StepDumps,
    ) -> None:
        """`replay` says what of a decision comes out otherwise than recorded."""
        self._pipeline = pipeline
        self._blueprints = blueprints
        self._decisions = decisions
        self._mode = mode
        self._pauses = pauses
        self._updates = updates
        self._replay = replay
        self._reports = reports
        self._dumps = dumps
        self._started = time.monotonic()
        self._reporting = Deferred(REPORTING_DELAY_SECONDS, pipeline.report)
        self._inboxes: set[Inbox[bytes]] = set()

    async def OpenRun(self, request: OpenRunRequest, call: Call) -> OpenRunResponse:
        """Open or reopen a run."""
        common = PROTOCOL_VERSIONS & set(request.protocol_versions)
        if not common:
            raise FailedPrecondition(
                f"The client speaks protocol {sorted(request.protocol_versions)}, this server"
                f" {sorted(PROTOCOL_VERSIONS)}; update the older of the two.",
                reason="NO_COMMON_PROTOCOL_VERSION",
            )
        version, candidates = self._blueprints.version, self._blueprints.candidates(request.sites)
        with giving_way():  # The steps of others go on.
            graph = await asyncio.to_thread(build_graph, request, candidates)
        self._pipeline.report()  # Before an open run gets another graph.
        created = self._pipeline.runs.open(
            request, str(call.peer), candidates, version, protocol_version=max(common),
            policy_norms=self._pipeline.policy.norms, graph=graph,
        )  # fmt: skip
        return OpenRunResponse(
            protocol_version=max(common),
            features=sorted(FEATURES & set(request.features)),
            policy_version=self._pipeline.policy.version,
            policy_digest=self._pipeline.policy.digest,
            server_time_ns=self._pipeline.clock_ns(),
            created=created,
        )

    async def CloseRun(self, request: CloseRunRequest, call: Call) -> CloseRunResponse:
        """Forget a run."""
        closed = self._pipeline.runs.close(request.run_id, str(call.peer))
        if closed:
            self._pipeline.report()  # What its last steps told comes before its end.
            self._pipeline.observations.note_closed(request.run_id)
        return CloseRunResponse(closed=closed)

    async def EvaluateSteps(self, requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        """Answer steps until the client ends the stream or the server drains."""
        owner = str(call.peer)
        async with Inbox(requests, leave_after_seconds=call.seconds_until_leaving) as inbox:
            self._inboxes.add(inbox)
            try:
                async for raw in inbox:
                    if raw is not None:
                        yield await self._pipeline.evaluate_in_band(raw, owner)
                        self._pipeline.report()
                    elif self._pipeline.runs.protocol_of(owner) >= 2:
                        yield FAREWELL
            finally:
                self._inboxes.discard(inbox)

    async def EvaluateStep(self, raw: bytes, call: Call) -> bytes:
        """Answer one step."""
        left = call.time_remaining()
        remaining = math.inf if left is None else left
        reply = await self._pipeline.evaluate(raw, str(call.peer), time.perf_counter(), remaining)
        self._reporting.ask()
        return reply

    async def EvaluateEpoch(self, raw: bytes, call: Call) -> bytes:
        """Decide on a state without the hurry of a step."""
        # An EvaluateEpochResponse has the bytes of an EvaluateStepsResponse.
        reply = await self._pipeline.evaluate_epoch(raw, str(call.peer), time.perf_counter())
        self._reporting.ask()
        return reply

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
        if request.enabled:
            self._mode.enter(f"operator: {request.reason}", by_hand=True)
        else:
            self._mode.leave()
            for run in self._pipeline.runs.all():
                run.mode.leave()
        return SetConservativeModeResponse(enabled=self._mode.enabled)

    async def GetStatus(self, request: GetStatusRequest, call: Call) -> GetStatusResponse:
        """Return a snapshot."""
        pipeline = self._pipeline
        reason = self._conservative_reason()
        healthy, degraded = HealthStatus.HEALTH_STATUS_HEALTHY, HealthStatus.HEALTH_STATUS_DEGRADED
        return GetStatusResponse(
            status=degraded if self._mode.enabled else healthy,
            policy_version=pipeline.policy.version,
            conservative_mode=bool(reason),
            conservative_reason=reason,
            runs=[
                RunStatus(
                    run_id=run.request.run_id, owner=run.owner, global_step=run.global_step, evaluated_steps=run.steps,
                    issued_commands=run.commands, graph_nodes=run.graph.node_count, graph_edges=run.graph.edge_count,
                )
                for run in pipeline.runs.all()
            ],
            breakers=[
                BreakerStatus(name=name, state=breaker.state, consecutive_failures=breaker.consecutive_failures)
                for name, breaker in pipeline.breakers.all().items()
            ],
            decisions=pipeline.kinds,
            reasons=pipeline.reasons,
            uptime_seconds=time.monotonic() - self._started,
            plan=pipeline.policy.plan,
            blueprints=len(self._blueprints),
        )  # fmt: skip

    def _conservative_reason(self) -> str:
        """Why the service holds back, else why one of the runs is held back; empty when none is."""
        held = (f"run {run.request.run_id}: {run.mode.reason}" for run in self._pipeline.runs.all() if run.mode.enabled)
        return self._mode.reason if self._mode.enabled else next(held, "")

    async def AckFieldReport(self, request: AckFieldReportRequest, call: Call) -> AckFieldReportResponse:
        """Note that a report arrived; when this returns it is on the disk."""
        self._pipeline.report()
        known = await self._reports.acknowledge(request.report_id)
        return AckFieldReportResponse(already_acknowledged=known)

    async def ListFieldReports(self, request: ListFieldReportsRequest, call: Call) -> ListFieldReportsResponse:
        """Return a page of the reports in the journal, acknowledged or not."""
        self._pipeline.report()
        reports, more = await self._reports.page(request.page_size or DEFAULT_PAGE, request.page_token)
        return ListFieldReportsResponse(reports=reports, next_page_token=more)

    async def PublishHistory(self, request: PublishHistoryRequest, call: Call) -> PublishHistoryResponse:
        """Hand over what is due now; there is no publisher of telemetry."""
        self._pipeline.report()
        return PublishHistoryResponse(field_reports=await self._reports.flush())

    async def ExplainDecision(self, request: ExplainDecisionRequest, call: Call) -> ExplainDecisionResponse:
        """Return the record of a decision."""
        self._pipeline.report()
        return await asyncio.to_thread(self._decisions.explain, _key_of(request))

    async def ReplayDecision(self, request: ReplayDecisionRequest, call: Call) -> ReplayDecisionResponse:
        """Decide again from the record, beside the steps."""
        self._pipeline.report()
        found = await self._replay(_key_of(request))
        return ReplayDecisionResponse(identical=not found, differences=found)

    async def ListStepDumps(self, request: ListStepDumpsRequest, call: Call) -> ListStepDumpsResponse:
        """Return a page of what was written down of the last steps; first write what is due."""
        self._pipeline.report()
        dumps, more = await self._dumps.page(request.page_size or DEFAULT_PAGE, request.page_token)
        return ListStepDumpsResponse(dumps=dumps, next_page_token=more)

    async def ListDumpedSteps(self, request: ListDumpedStepsRequest, call: Call) -> ListDumpedStepsResponse:
        """Return a page of the steps of a dump."""
        size = request.page_size or DEFAULT_PAGE
        steps, more = await self._dumps.steps(request.dump_id, size, request.page_token)
        return ListDumpedStepsResponse(steps=steps, next_page_token=more)

    def _check_run(self, run_id: str, call: Call) -> None:
        """Raise NotFound, or PermissionDenied for another's run."""
        runs = self._pipeline.runs
        if call.peer.role == "operator":
            runs.find(run_id)
        else:
            runs.get(run_id, str(call.peer))

    async def is_able_to_serve(self) -> bool:
        """Whether steps get decisions; without inference they would all be NoAction."""
        return self._pipeline.breaker.state != CircuitState.CIRCUIT_STATE_OPEN

    def begin_drain(self) -> None:
        """Ask every stream to go elsewhere."""
        for inbox in self._inboxes:
            inbox.leave()


def _key_of(request: ExplainDecisionRequest | ReplayDecisionRequest) -> str:
    if request.command_id:
        return request.command_id
    if not request.run_id or not request.sequence:
        raise InvalidRequest("Name a command, or a run and the sequence of one of its steps.")
    return key_of_step(request.run_id, request.sequence)
