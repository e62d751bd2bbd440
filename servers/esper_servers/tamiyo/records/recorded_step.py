from __future__ import annotations

from esper_rpc.journal import Record
from esper_rpc.proto.leyline.v1 import AdaptationCommand, SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import (
    DumpedStep,
    EvaluateEpochRequest,
    EvaluateStepsRequest,
    EvaluateStepsResponse,
    ExplainDecisionResponse,
    RecordedStep,
    StepDecision,
)

from .evidence import key_of_step
from .flight_recorder import AnsweredStep

KIND = "dumped_step"


def record_of(dump_id: str, step: AnsweredStep) -> Record:
    """Write a step down as one of a dump."""
    recorded = RecordedStep(
        dump_id=dump_id, run_id=step.run_id, sequence=step.sequence, request=step.request, reply=step.reply,
        policy_version=step.policy_version, answered_ns=step.answered_ns, epoch=step.is_epoch,
    )  # fmt: skip
    return Record(KIND, key_of_step(step.run_id, step.sequence), recorded.SerializeToString())


def summary_of(recorded: RecordedStep) -> DumpedStep:
    """Tell what was asked and answered in short."""
    packet, budget_us = _asked(recorded)
    decision = _decision(recorded)
    command = _command(decision)
    step = DumpedStep(
        dump_id=recorded.dump_id, run_id=recorded.run_id, sequence=recorded.sequence, global_step=packet.global_step,
        policy_version=recorded.policy_version, budget_us=budget_us, command_id=command.command_id,
        command_type=command.command_type, operation=command.seed_operation.operation,
        reason=_reason(decision, command), ledger=decision.ledger,
    )  # fmt: skip
    step.answered_at.FromNanoseconds(recorded.answered_ns)
    return step


def explanation_of(recorded: RecordedStep) -> ExplainDecisionResponse:
    """Tell what was asked and answered; on what it was decided beside the packet was not kept."""
    packet, _ = _asked(recorded)
    decision = _decision(recorded)
    command = _command(decision)
    return ExplainDecisionResponse(
        command=command if command.command_id else None, packet=packet, reason=_reason(decision, command),
        policy_version=recorded.policy_version, ledger=decision.ledger, dump_id=recorded.dump_id,
    )  # fmt: skip


def _asked(recorded: RecordedStep) -> tuple[SystemStatePacket, int]:
    if recorded.epoch:
        return EvaluateEpochRequest.FromString(recorded.request).packet, 0
    step = EvaluateStepsRequest.FromString(recorded.request).step
    return step.packet, step.budget_us


def _decision(recorded: RecordedStep) -> StepDecision:
    return EvaluateStepsResponse.FromString(recorded.reply).decision


def _command(decision: StepDecision) -> AdaptationCommand:
    return AdaptationCommand.FromString(decision.command.payload)


def _reason(decision: StepDecision, command: AdaptationCommand) -> str:
    return command.annotations.get("reason", "") or decision.no_action.reason
