from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from opentelemetry.trace import SpanKind

from esper_rpc.proto.leyline.v1 import CommandType, SystemStatePacket, TelemetryLevel
from esper_rpc.proto.tamiyo.v1 import Step, StepLedger
from esper_rpc.telemetry.events import name_of, tell_event
from esper_rpc.telemetry.metrics import observe_decision, observe_risk, tell_coverage, tell_losses
from esper_rpc.telemetry.tracing import record_span

from .choosing import BUDGET_EXHAUSTED
from .risk.engine import Verdict
from .risk.events import SOURCE, is_due, level_of, priority_of
from .risk.signals.blueprint import HAZARD_CRITICAL, HAZARD_HIGH
from .run_state import RunState

log = structlog.get_logger(__name__)

MOST_UNREPORTED = 4096
STEPS_PER_SAMPLE = 100
"""Steps without a command of which one has its coverage looked at."""
TIMEOUT_INFERENCE = "timeout_inference"
PAUSE_TRIGGERED = "pause_triggered"
PAUSE = CommandType.Name(CommandType.COMMAND_TYPE_PAUSE).removeprefix("COMMAND_TYPE_")
_BANDS = {HAZARD_HIGH: "HIGH", HAZARD_CRITICAL: "CRITICAL"}


@dataclass(frozen=True, slots=True)
class Reported:
    """What is told of a decision once its answer is on its way."""

    step: Step
    ledger: StepLedger
    kind: str
    reason: str
    run: RunState
    verdict: Verdict
    command_id: str = ""
    batch_size: int = 0
    """0 where the policy was not asked."""


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
            self._tell_timeout(reported)
            self._observe(reported)
            if reported.command_id or self._reported % STEPS_PER_SAMPLE == 0:
                looked_at = reported.run
            self._reported += 1
        if looked_at is not None:
            coverage = looked_at.graph.coverage()
            tell_coverage(coverage.overall, coverage.types)

    def _tell_timeout(self, reported: Reported) -> None:
        run = reported.run
        if reported.reason != BUDGET_EXHAUSTED or not is_due(
            run.risk.told, TIMEOUT_INFERENCE, run.steps, self._quiet_steps
        ):
            return
        _tell(
            reported,
            TIMEOUT_INFERENCE,
            TelemetryLevel.TELEMETRY_LEVEL_ERROR,
            spent_ms=reported.ledger.total_us / 1000,
            inference_ms=reported.ledger.inference_us / 1000,
        )


def _record(reported: Reported) -> None:
    observe_decision(reported.ledger, reported.kind, reported.reason, reported.batch_size)
    _observe_risk(reported.verdict)
    _tell_losses(reported.step.packet, reported.run)
    if reported.step.traceparent:
        _record_span(reported)
    if reported.command_id:
        _log_command(reported)
    if reported.kind == PAUSE:
        _tell(reported, PAUSE_TRIGGERED, level_of(reported.verdict), command_id=reported.command_id)


def _tell_losses(packet: SystemStatePacket, run: RunState) -> None:
    told = packet.HasField("validation_loss")
    delta = packet.training_metrics.get("loss_delta", run.risk.loss_rise)
    tell_losses(packet.validation_loss if told else None, delta)


def _tell(reported: Reported, name: str, level: TelemetryLevel.ValueType, **details: str | float) -> None:
    tell_event(
        SOURCE, name, level, reason=reported.reason, step_index=reported.step.packet.global_step,
        run_id=reported.step.run_id, timeout_budget_ms=reported.step.budget_us / 1000, **details,
    )  # fmt: skip


def _observe_risk(verdict: Verdict) -> None:
    blueprint = verdict.readings.get("blueprint")
    if blueprint is None:
        observe_risk(verdict.score, None, "")
    else:
        observe_risk(verdict.score, blueprint.score, _BANDS.get(blueprint.reason, ""))


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
        run_id=reported.step.run_id,
        step_index=reported.step.packet.global_step,
        priority=name_of(priority_of(reported.verdict)),
        timeout_budget_ms=reported.step.budget_us / 1000,
        command_id=reported.command_id,
        kind=reported.kind,
        reason=reported.reason,
    )
