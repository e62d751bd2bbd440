from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from esper_rpc.envelope.reasons import STALE_COMMAND
from esper_rpc.proto.leyline.v1 import CommandOutcome

LONGEST_REST = 8
"""Steps. A seed that blends holds back what lies below it; where most commands are late it must not wait for long."""
_LATE = frozenset({CommandOutcome.RESULT_LATE, CommandOutcome.RESULT_LOCAL_FALLBACK})


class Marks(NamedTuple):
    """What a command leaves in what is known of a run."""

    germinated_at: int
    optimizer_at: int
    paused_at: int
    adjusted: bool


class CommandRest:
    """How long a run is left alone after commands that came too late for it.

    A command takes longer than any other answer, and what made one late lasts: asked at once, the next is late as well.
    """

    def __init__(self) -> None:
        self.late = 0
        """Commands in a row that came too late."""
        self.until = 0
        """The step from which on the run may be commanded again."""
        self._unheard: tuple[str, Marks] | None = None

    def note_issued(self, command_id: str, before: Marks) -> None:
        """Expect to hear of a command; `before` is how the run was without it."""
        self._unheard = command_id, before

    def hear(self, outcomes: Sequence[CommandOutcome], *, step: int, longest: int) -> Marks | None:
        """Take in what a step tells; how the run was before its last command if that came too late, else None.

        After each one in a row it rests twice as long, at most eight steps or `longest`.
        """
        if self._unheard is None:
            return None
        command_id, before = self._unheard
        told = _of(command_id, outcomes)
        if told is None:
            return None
        self._unheard = None
        if not _is_late(told):
            self.late = 0
            return None
        self.late += 1
        self.until = step + min(2 ** min(self.late, LONGEST_REST), LONGEST_REST, longest)
        return before


def _of(command_id: str, outcomes: Sequence[CommandOutcome]) -> CommandOutcome | None:
    """What is told of the last command: that its step had no answer is told sooner than that it came late."""
    named = (outcome for outcome in outcomes if outcome.command_id == command_id)
    unanswered = (outcome for outcome in outcomes if outcome.result == CommandOutcome.RESULT_LOCAL_FALLBACK)
    return next(named, None) or next(unanswered, None)


def _is_late(outcome: CommandOutcome) -> bool:
    return outcome.result in _LATE or outcome.reason == STALE_COMMAND
