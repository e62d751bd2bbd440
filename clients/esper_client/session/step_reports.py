from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from esper_client.event_loop import LoopThread
from esper_rpc.deferred import Deferred
from esper_rpc.ledger import StepTiming
from esper_rpc.proto.leyline.v1 import CommandOutcome

from .step_report import report_step

WHILE_ANSWERED_SECONDS = 0.0005
LONGEST_SECONDS = 0.25
MOST_WAITING = 64


class StepReports:
    """What became of steps, counted and logged by the loop when it is awake anyway.

    To wake it at the end of a step would take the interpreter from the training thread. It is done while the next
    question is answered, or a quarter of a second after one was sent. The loop is woken only where many wait, since
    nothing can be sent.
    """

    def __init__(self, run_id: str, thread: LoopThread) -> None:
        self._run_id, self._thread = run_id, thread
        self._waiting: deque[tuple[int, StepTiming, Sequence[CommandOutcome]]] = deque()
        self._soon, self._later = Deferred(WHILE_ANSWERED_SECONDS, self.write), Deferred(LONGEST_SECONDS, self.write)

    def add(self, step: int, timing: StepTiming, outcomes: Sequence[CommandOutcome]) -> None:
        """Keep the report of a step; on the training thread."""
        self._waiting.append((step, timing, outcomes))
        if len(self._waiting) >= MOST_WAITING:
            self._wake()

    def question_sent(self) -> None:
        """Write what waits while Tamiyo works, and later what comes of this question; on the loop."""
        self._soon.ask()
        self._later.ask()

    def write(self) -> None:
        """Write what waits."""
        while self._waiting:
            report_step(self._run_id, *self._waiting.popleft())

    def _wake(self) -> None:
        try:
            self._thread.loop.call_soon_threadsafe(self.write)
        except RuntimeError:
            # The session is closed, and its loop with it.
            self.write()
