from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from opentelemetry.trace import SpanKind

from esper_rpc.proto.tamiyo.v1 import Step, StepLedger
from esper_rpc.telemetry.metrics import observe_decision, observe_risk, tell_coverage
from esper_rpc.telemetry.tracing import record_span

from .risk.engine import Verdict
from .risk.signals.blueprint import HAZARD_CRITICAL, HAZARD_HIGH
from .run_state import RunState

log = structlog.get_logger(__name__)

MOST_UNREPORTED = 4096
STEPS_PER_SAMPLE = 100
"""Steps without a command of which one has its coverage looked at."""
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


class DecisionReports:
    """What was decided and is not told yet: telling waits until the answer has left."""

    def __init__(self, observe: Callable[[Reported], None] = lambda _: None) -> None:
        self._waiting: deque[Reported] = deque(maxlen=MOST_UNREPORTED)
        self._observe = observe
        self._reported = 0

    def note(self, reported: Reported) -> None:
        """Keep a decision for the next report."""
        self._waiting.append(reported)

    def report(self) -> None:
        """Record metrics, spans and logs of everything noted; of coverage only the last is shown."""
        looked_at: RunState | None = None
        while self._waiting:
            reported = self._waiting.popleft()
            _record(reported)
            self._observe(reported)
            if reported.command_id or self._reported % STEPS_PER_SAMPLE == 0:
                looked_at = reported.run
            self._reported += 1
        if looked_at is not None:
            coverage = looked_at.graph.coverage()
            tell_coverage(coverage.overall, coverage.types)


def _record(reported: Reported) -> None:
    observe_decision(reported.ledger, reported.kind, reported.reason)
    _observe_risk(reported.verdict)
    if reported.step.traceparent:
        _record_span(reported)
    if reported.command_id:
        _log_command(reported)


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
            **parts,
        },
    )


def _log_command(reported: Reported) -> None:
    log.info(
        "command_issued",
        run_id=reported.step.run_id,
        step=reported.step.packet.global_step,
        command_id=reported.command_id,
        kind=reported.kind,
        reason=reported.reason,
    )
