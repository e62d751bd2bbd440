from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from esper_rpc.proto.leyline.v1 import CommandOutcome

MOST_KEPT = 256


class UntoldOutcomes:
    """What became of commands, kept until a question that told it was answered."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, CommandOutcome]] = deque(maxlen=MOST_KEPT)

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[CommandOutcome]:
        return (outcome for _, outcome in self._waiting)

    def add(self, outcomes: Iterable[CommandOutcome], *, sequence: int) -> None:
        """Keep outcomes that came when the question with this sequence was the last one."""
        self._waiting += ((sequence, outcome) for outcome in outcomes)

    def add_fallback(self, reason: str, *, sequence: int, global_step: int) -> None:
        """Keep that a step had no answer; one stands for all in a row, lest an outage push out the commands."""
        fallback = CommandOutcome.RESULT_LOCAL_FALLBACK
        if self._waiting and self._waiting[-1][1].result == fallback:
            self._waiting.pop()
        self.add([CommandOutcome(result=fallback, reason=reason, global_step=global_step)], sequence=sequence)

    def drop_told(self, sequence: int) -> None:
        """Forget what the question with this sequence carried: all that was kept before it was asked."""
        while self._waiting and self._waiting[0][0] < sequence:
            self._waiting.popleft()
