from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator

from esper_rpc.deferred import Deferred
from esper_rpc.errors import FailedPrecondition
from esper_rpc.inbox import Inbox
from esper_rpc.proto.leyline.v1 import CircuitState
from esper_rpc.proto.tamiyo.v1 import (
    CloseRunRequest,
    CloseRunResponse,
    EvaluateStepsResponse,
    OpenRunRequest,
    OpenRunResponse,
    StepDecision,
)
from esper_rpc.server import Call

from .pipeline import StepPipeline
from .step_processes.held_runs import HeldRuns

PROTOCOL_VERSIONS = frozenset({1, 2})
"""1: steps and decisions. 2: also the greeting, `going_away` and the pushback of an overloaded server."""
FEATURES = frozenset({"seed", "pause", "optimizer"})
REPORTING_DELAY_SECONDS = 0.005
"""The answer of a unary call leaves after its handler returned, and need not wait for the report on it."""
RAW_METHODS = frozenset({"EvaluateEpoch", "EvaluateStep", "EvaluateSteps", "IngestPolicyUpdate"})
FAREWELL = EvaluateStepsResponse(decision=StepDecision(going_away=True)).SerializeToString()


class StepServicer:
    """Opens runs and answers their steps."""

    def __init__(self, pipeline: StepPipeline, runs: HeldRuns) -> None:
        self._pipeline = pipeline
        self._runs = runs
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
        created = await self._runs.open(request, str(call.peer), protocol_version=max(common))
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
        return CloseRunResponse(closed=await self._runs.close(request.run_id, str(call.peer)))

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

    async def is_able_to_serve(self) -> bool:
        """Whether steps get decisions; without inference they would all be NoAction."""
        return self._pipeline.breaker.state != CircuitState.CIRCUIT_STATE_OPEN

    def begin_drain(self) -> None:
        """Ask every stream to go elsewhere."""
        for inbox in self._inboxes:
            inbox.leave()
