from __future__ import annotations

from typing import NamedTuple

from esper_rpc.proto.leyline.v1 import CommandOutcome

MALFORMED = "malformed_payload"


class Answer(NamedTuple):
    """What became of a command, and the stable reason why."""

    result: CommandOutcome.Result.ValueType
    reason: str = ""


APPLIED = Answer(CommandOutcome.RESULT_APPLIED)


def rejected(reason: str) -> Answer:
    """The command must not be carried out; nothing has changed."""
    return Answer(CommandOutcome.RESULT_REJECTED, reason)


def failed(reason: str) -> Answer:
    """The command was legal and could not be carried out."""
    return Answer(CommandOutcome.RESULT_FAILED, reason)
