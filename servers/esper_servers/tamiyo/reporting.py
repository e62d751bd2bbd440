from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from opentelemetry.trace import SpanKind

from esper_rpc.proto.leyline.v1 import CommandType, SeedOperation, SystemStatePacket, TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import Step, StepLedger
from esper_rpc.telemetry.events import name_of, tell_event
from esper_rpc.telemetry.metrics import observe_blending, observe_decision, observe_risk, tell_coverage, tell_losses
from esper_rpc.telemetry.tracing import record_span
from esper_servers.policy.vocabularies import SCHEDULES

from .choosing import BUDGET_EXHAUSTED, INFERENCE_FAILED, LATE_COMMANDS, Decided
from .risk.engine import Verdict
from .risk.events import SOURCE, is_due, level_of, priority_of
from .risk.reading import DEMAND_NAMES
from .risk.signals.blueprint import HAZARD_CRITICAL, HAZARD_HIGH
from .run_state import RunState

log = structlog.get_logger(__name__)

MOST_UNREPORTED = 4096
STEPS_PER_SAMPLE = 100
"""Steps without a command of which one has its coverage looked at."""
TIMEOUT_INFERENCE = "timeout_inference"
PAUSE_TRIGGERED = "pause_triggered"
PAUSE = CommandType.Name(CommandType.COMMAND_TYPE_PAUSE).removeprefix("COMMAND_TYPE_")
GRAFT = SeedOperation.Name(SeedOperation.SEED_OPERATION_START_GRAFTING).removeprefix("SEED_OPERATION_")
_FAULTS = {
    BUDGET_EXHAUSTED: TIMEOUT_INFERENCE, INFERENCE_FAILED: INFERENCE_FAILED, LATE_COMMANDS: LATE_COMMANDS,
}  # fmt: skip
"""Why a step got no decision, and how that is told."""
_BANDS = {HAZARD_HIGH: "HIGH", HAZARD_CRITICAL: "CRITICAL"}


@dataclass(frozen=True, slots=True)
class Reported:
    """What is told of a decision once its answer is on its way."""

    step: Step
    ledger: StepLedger
    kind: str
    decided: Decided
    run: RunState
    verdict: Verdict
    command_id: str = ""
    budget_seconds: float = 0.0
    policy_version: str = ""
    plan: str = ""
    """Of the policy; a large graph may have been computed by the eager one all the same."""

    @property
    def reason(self) -> str:
        """Why it was decided so."""
        return self.decided.reason

    @property
    def indicators(self) -> dict[str, str | float]:
        """What an event of this step and the line of its command have in common."""
        return {
            "run_id": self.step.run_id, "timeout_budget_ms": self.budget_seconds * 1000,
            "policy_version": self.policy_version, "plan": self.plan,
        }  # fmt: skip


class DecisionReports:
    """What was decided and is not told yet: telling waits until the answer has left."""

    def __init__(self, observe: Callable[[Reported], None] = lambda _: None, *, quiet_steps: int = 1) -> None:
        """`quiet_steps` is for how many steps a run is not told of the same again."""
        self._quiet_steps = quiet_steps
        self._waiting: deque[Reported] = deque(maxlen=MOST_UNREPORTED)
        self._observe = observe
        self._reported = 0

    def note(self, reported: Reported) -> None:
        """Keep a decision for the next report."""
        self._waiting.append(reported)

    def report(self) -> None:
        """Record metrics, spans, events and logs of everything noted; of coverage only the last is shown."""
        looked_at: RunState | None = None
        while self._waiting:
            reported = self._waiting.popleft()
            _record(reported)
            self._tell_fault(reported)
            self._observe(reported)
            if reported.command_id or self._reported % STEPS_PER_SAMPLE == 0:
                looked_at = reported.run
            self._reported += 1
        if looked_at is not None:
            coverage = looked_at.graph.coverage()
            tell_coverage(coverage.overall, coverage.types)

    def _tell_fault(self, reported: Reported) -> None:
        run, fault = reported.run, _FAULTS.get(reported.reason)
        if fault is None or not is_due(run.risk.told, fault, run.steps, self._quiet_steps):
            return
        is_slow_trainer = fault == LATE_COMMANDS
        level = TelemetryLevel.TELEMETRY_LEVEL_WARNING if is_slow_trainer else TelemetryLevel.TELEMETRY_LEVEL_ERROR
        _tell(reported, fault, level, **_details(reported))


def _details(reported: Reported) -> dict[str, str | float]:
    if reported.reason == LATE_COMMANDS:
        return {"late_in_a_row": reported.run.rest.late}
    if reported.reason == INFERENCE_FAILED:
        return {"error": reported.decided.error}
    return _spent(reported.ledger)


def _spent(ledger: StepLedger) -> dict[str, str | float]:
    """Where the time went; what is left is that of all other parts."""
    return {
        "spent_ms": ledger.total_us / 1000, "queue_ms": ledger.queue_us / 1000,
        "inference_ms": ledger.inference_us / 1000,
    }  # fmt: skip


def _record(reported: Reported) -> None:
    observe_decision(reported.ledger, reported.kind, reported.reason, reported.decided.batch_size)
    _observe_risk(reported.verdict)
    _tell_losses(reported.step.packet, reported.run)
    if reported.step.traceparent:
        _record_span(reported)
    if reported.command_id:
        _log_command(reported)
    if reported.kind == GRAFT and reported.decided.choice is not None:
        observe_blending(SCHEDULES[reported.decided.choice.schedule])
    if reported.kind == PAUSE:
        _tell(reported, PAUSE_TRIGGERED, level_of(reported.verdict), command_id=reported.command_id)


def _tell_losses(packet: SystemStatePacket, run: RunState) -> None:
    told = packet.HasField("validation_loss")
    delta = packet.training_metrics.get("loss_delta", run.risk.loss_rise)
    tell_losses(packet.validation_loss if told else None, delta)


def _tell(reported: Reported, name: str, level: TelemetryLevel.ValueType, **details: str | float) -> None:
    tell_event(
        SOURCE, name, level, reason=reported.reason, step_index=reported.step.packet.global_step,
        **reported.indicators, **details,
    )  # fmt: skip


def _observe_risk(verdict: Verdict) -> None:
    blueprint, demand = verdict.readings.get("blueprint"), DEMAND_NAMES[verdict.demand]
    if blueprint is None:
        observe_risk(verdict.score, demand, None, "")
    else:
        observe_risk(verdict.score, demand, blueprint.score, _BANDS.get(blueprint.reason, ""))


def _record_span(reported: Reported) -> None:
    parts = {f"esper.{field.name}": getattr(reported.ledger, field.name) for field in StepLedger.DESCRIPTOR.fields}
    now = time.time_ns()
    record_span(
        "tamiyo.evaluate",
        start_ns=now - reported.ledger.total_us * 1000,
        end_ns=now,
        traceparent=reported.step.traceparent,
        kind=SpanKind.SERVER,
        attributes={
            "esper.run_id": reported.step.run_id,
            "esper.global_step": reported.step.packet.global_step,
            "esper.decision": reported.kind,
            "esper.reason": reported.reason,
            "esper.command_id": reported.command_id,
            "esper.budget_us": reported.step.budget_us,
            **parts,
        },
    )


def _log_command(reported: Reported) -> None:
    log.info(
        "command_issued",
        **reported.indicators,
        step_index=reported.step.packet.global_step,
        priority=name_of(priority_of(reported.verdict)),
        command_id=reported.command_id,
        kind=reported.kind,
        reason=reported.reason,
    )
