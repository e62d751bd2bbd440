from __future__ import annotations

import time
from collections.abc import Sequence

import structlog
from opentelemetry import trace

from esper_rpc.ledger import StepTiming
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.telemetry.metrics import observe_outcome, observe_step
from esper_rpc.telemetry.tracing import current_traceparent, record_span

log = structlog.get_logger(__name__)


def trace_step(run_id: str, step: int, outcomes: Sequence[CommandOutcome], apply_seconds: float) -> None:
    """Name the step in its span, and give the work on the model a span of its own, where steps are traced."""
    traceparent = current_traceparent()
    if not traceparent:
        return
    trace.get_current_span().set_attributes({"esper.run_id": run_id, "esper.global_step": step})
    now = time.time_ns()
    record_span(
        "kasmina.apply",
        start_ns=now - int(apply_seconds * 1e9),
        end_ns=now,
        traceparent=traceparent,
        attributes={"esper.command_ids": ",".join(outcome.command_id for outcome in outcomes)},
    )


def report_step(run_id: str, step: int, timing: StepTiming, outcomes: Sequence[CommandOutcome]) -> None:
    """Count and log what became of a step. Takes as long as verifying a command: not for the training thread."""
    observe_step(timing)
    for outcome in outcomes:
        observe_outcome(outcome)
        # What is queued is settled in this step or the next.
        if outcome.result != CommandOutcome.RESULT_QUEUED:
            _log(run_id, step, outcome)


def _log(run_id: str, step: int, outcome: CommandOutcome) -> None:
    log.info(
        "command_outcome",
        run_id=run_id,
        step=step,
        command_id=outcome.command_id,
        result=CommandOutcome.Result.Name(outcome.result),
        reason=outcome.reason,
    )
