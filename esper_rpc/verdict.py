from __future__ import annotations

from typing import NamedTuple

from esper_rpc.proto.leyline.v1 import AdaptationCommand, CommandOutcome

MALFORMED = "malformed_payload"


class Verdict(NamedTuple):
    """What became of a command, and the stable reason why."""

    result: CommandOutcome.Result.ValueType
    reason: str = ""

    def on(self, command_id: str, global_step: int, command: AdaptationCommand | None = None) -> CommandOutcome:
        """Tell it as an outcome; `command` is None when its bytes were not read."""
        outcome = CommandOutcome(command_id=command_id, result=self.result, reason=self.reason, global_step=global_step)
        if command is not None:
            outcome.seed_id = command.target_seed_id
            outcome.operation = command.seed_operation.operation
        return outcome


QUEUED = Verdict(CommandOutcome.RESULT_QUEUED)
APPLIED = Verdict(CommandOutcome.RESULT_APPLIED)


def failed(reason: str) -> Verdict:
    """The command was legal and could not be carried out."""
    return Verdict(CommandOutcome.RESULT_FAILED, reason)


def rejected(reason: str) -> Verdict:
    """The command must not be carried out; nothing has changed."""
    return Verdict(CommandOutcome.RESULT_REJECTED, reason)
