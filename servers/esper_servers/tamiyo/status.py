"""What GetStatus tells: the status of each process, and of all of them together."""

from __future__ import annotations

from collections.abc import Sequence

from esper_rpc.proto.leyline.v1 import CircuitState, HealthStatus
from esper_rpc.proto.tamiyo.v1 import BreakerStatus, DeviceStatus, GetStatusResponse, RunStatus
from esper_servers.policy.cuda_plan import DeviceUse

from .blueprint_cache import BlueprintCache
from .pipeline import StepPipeline
from .run_state import RunState

_SEVERITY = {
    CircuitState.CIRCUIT_STATE_CLOSED: 0, CircuitState.CIRCUIT_STATE_HALF_OPEN: 1, CircuitState.CIRCUIT_STATE_OPEN: 2,
}  # fmt: skip


def status_of(pipeline: StepPipeline, blueprints: BlueprintCache) -> GetStatusResponse:
    """Return a snapshot of one process."""
    reason = pipeline.conservative_reason
    healthy, degraded = HealthStatus.HEALTH_STATUS_HEALTHY, HealthStatus.HEALTH_STATUS_DEGRADED
    return GetStatusResponse(
        status=degraded if pipeline.mode.enabled else healthy,
        policy_version=pipeline.policy.version,
        conservative_mode=bool(reason),
        conservative_reason=reason,
        runs=map(_run_status, pipeline.runs.all()),
        breakers=[
            BreakerStatus(name=name, state=breaker.state, consecutive_failures=breaker.consecutive_failures)
            for name, breaker in pipeline.breakers.all().items()
        ],
        decisions=pipeline.kinds,
        reasons=pipeline.reasons,
        plan=pipeline.policy.plan,
        blueprints=len(blueprints),
        plan_problem=pipeline.policy.plan_problem,
        device=_device_status(pipeline.policy.device_use),
    )


def merged(statuses: Sequence[GetStatusResponse]) -> GetStatusResponse:
    """Return the status of all processes: runs and counts together, of the rest the worst, else that of the first."""
    whole = GetStatusResponse()
    whole.CopyFrom(statuses[0])
    for status in statuses[1:]:
        whole.status = max(whole.status, status.status)
        whole.conservative_mode |= status.conservative_mode
        whole.conservative_reason = whole.conservative_reason or status.conservative_reason
        whole.plan_problem = whole.plan_problem or status.plan_problem
        whole.runs.extend(status.runs)
        for counts, more in ((whole.decisions, status.decisions), (whole.reasons, status.reasons)):
            for name, count in more.items():
                counts[name] += count
        for own, other in zip(whole.breakers, status.breakers, strict=True):
            if (_SEVERITY[other.state], other.consecutive_failures) > (_SEVERITY[own.state], own.consecutive_failures):
                own.CopyFrom(other)
    return whole


def _device_status(use: DeviceUse | None) -> DeviceStatus | None:
    if use is None:
        return None
    times = use.times._asdict()
    return DeviceStatus(name=use.name, peak_bytes=use.peak_bytes, budget_bytes=use.budget_bytes, **times)


def _run_status(run: RunState) -> RunStatus:
    return RunStatus(
        run_id=run.request.run_id, owner=run.owner, global_step=run.global_step, evaluated_steps=run.steps,
        issued_commands=run.commands, graph_nodes=run.graph.node_count, graph_edges=run.graph.edge_count,
    )  # fmt: skip
