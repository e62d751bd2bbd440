from __future__ import annotations

from collections.abc import Iterable

OUTCOMES_MISSING = "outcomes_missing"
PATIENCE_STEPS = 10
"""A trainer tells an outcome with its next step, and again until that step was answered."""
MOST_MISSING = 3


class AwaitedOutcomes:
    """The commands of a run of which no outcome was told yet: whoever decides on must know what became of them."""

    def __init__(self) -> None:
        self._steps = 0
        self._issued: dict[str, int] = {}
        self._missing = 0

    def note(self, told: Iterable[str], issued: str) -> bool:
        """Take in the commands that a step told of and the one it was answered with; whether too many have failed.

        That is so when several in a row never came back; then they are counted anew.
        """
        self._steps += 1
        for command_id in told:
            if self._issued.pop(command_id, None) is not None:
                self._missing = 0
        self._give_up_old()
        if issued:
            self._issued[issued] = self._steps
        has_failed = self._missing >= MOST_MISSING
        if has_failed:
            self._missing = 0
        return has_failed

    def _give_up_old(self) -> None:
        while self._issued:
            command_id, issued_at = next(iter(self._issued.items()))
            if self._steps - issued_at <= PATIENCE_STEPS:
                return
            del self._issued[command_id]
            self._missing += 1
