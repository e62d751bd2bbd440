from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from opentelemetry.trace import SpanKind

from esper_rpc.proto.tamiyo.v1 import Step, StepLedger
from esper_rpc.telemetry.metrics import observe_decision
from esper_rpc.telemetry.tracing import record_span

from .risk.engine import Verdict
from .run_state import RunState

log = structlog.get_logger(__name__)

MOST_UNREPORTED = 4096


@dataclass(frozen=True, slots=True)
class Reported:
    """What is told of a decision once its answer is on its way."""

    step: Step
    run: RunState
    ledger: StepLedger
    verdict: Verdict
    kind: str
    reason: str
    command_id: str = ""


class DecisionReports:
    """What was decided and is not told yet: telling waits until the answer has left."""

    def __init__(self, observe: Callable[[Reported], None] = lambda _: None) -> None:
        self._waiting: deque[Reported] = deque(maxlen=MOST_UNREPORTED)
        self._observe = observe

    def note(self, reported: Reported) -> None:
        """Keep a decision for the next report."""
        self._waiting.append(reported)

    def report(self) -> None:
        """Record metrics, spans and logs of everything noted."""
        while self._waiting:
            reported = self._waiting.popleft()
            observe_decision(reported.ledger, reported.kind, reported.reason)
            self._observe(reported)
            if reported.step.traceparent:
                _record_span(reported)
            if reported.command_id:
                _log_command(reported)


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
