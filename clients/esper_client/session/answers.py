from __future__ import annotations

import hashlib
from collections import Counter

import structlog

from esper_client.seed_host import SeedHost
from esper_client.step_exchange import MISSED, StepExchange
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.proto.tamiyo.v1 import StepDecision, StepStatus
from esper_rpc.telemetry.metrics import STEP_ANSWERS

from .questions import Questions

log = structlog.get_logger(__name__)


class Answers:
    """Takes Tamiyo's answers, has the host verify their commands, and keeps what Tamiyo is to be told of them."""

    def __init__(self, *, host: SeedHost, questions: Questions, exchange: StepExchange, reasons: Counter[str]) -> None:
        self._host = host
        self._reasons = reasons
        self._questions = questions
        self._untold = questions.untold
        self._exchange = exchange

    def receive(self, unsent: str, *, global_step: int) -> StepDecision | None:
        """Wait for the answer to the last step, unless there is a reason why that is `unsent`; None is a fallback."""
        decision = None if unsent else self._exchange.receive()
        if decision is not None:
            self._untold.drop_told(self._questions.sequence)
            return decision
        reason = unsent or MISSED
        self.count(reason)
        self._untold.add_fallback(reason, sequence=self._questions.sequence, global_step=global_step)
        return None

    def submit(self, decision: StepDecision, question: bytes) -> list[CommandOutcome]:
        """Hand the command of an answer to the host; what it verified, it carries out at its next safe point."""
        kind = decision.WhichOneof("decision")
        if kind != "command":
            self.count(decision.no_action.reason if kind == "no_action" else self._refused(decision.error))
            return []
        self.count("command")
        digest = hashlib.sha256(question).digest()
        return [self._host.submit(decision.command, expected_sequence=decision.sequence, request_digest=digest)]

    def _refused(self, error: StepStatus) -> str:
        reason = f"error_{error.code}"
        if reason not in self._reasons:
            log.warning("step_refused", reason=reason, problem=error.message)
        return reason

    def take_late(self, global_step: int) -> list[CommandOutcome]:
        """Tell of commands that came too late for their step."""
        late = [
            CommandOutcome(command_id=command_id, result=CommandOutcome.RESULT_LATE, global_step=global_step)
            for command_id in self._exchange.take_late_commands()
        ]
        self.keep(late)
        return late

    def keep(self, outcomes: list[CommandOutcome]) -> None:
        """Keep what became of commands for the next question."""
        self._untold.add(outcomes, sequence=self._questions.sequence)

    def count(self, reason: str) -> None:
        """Count a step by what came for it."""
        self._reasons[reason] += 1
        STEP_ANSWERS.labels(reason).inc()
