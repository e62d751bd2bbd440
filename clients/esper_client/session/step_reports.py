from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from esper_rpc.deferred import Deferred
from esper_rpc.ledger import StepTiming
from esper_rpc.proto.leyline.v1 import CommandOutcome, TelemetryLevel, TelemetryPacket
from esper_rpc.telemetry import record_packets

from .step_report import report_step

_CRITICAL = TelemetryLevel.TELEMETRY_LEVEL_CRITICAL
WHILE_ANSWERED_SECONDS = 0.0005
LONGEST_SECONDS = 0.25
COMPANY = 8
"""Reports that are written together; a step has two, its packets and what became of it."""


class StepReports:
    """What is to be counted and logged of steps, which the loop does when it is awake anyway.

    To wake it at the end of a step would take the interpreter from the training thread. Those of four steps are written
    together while the next question is answered, or what there is a quarter of a second after one was sent.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._waiting: deque[Callable[[], object]] = deque()
        self._soon, self._later = Deferred(WHILE_ANSWERED_SECONDS, self.write), Deferred(LONGEST_SECONDS, self.write)

    def add(self, step: int, timing: StepTiming, outcomes: Sequence[CommandOutcome]) -> None:
        """Keep what became of a step; on the training thread."""
        self._waiting.append(partial(report_step, self._run_id, step, timing, outcomes))

    def add_packets(self, packets: Sequence[TelemetryPacket]) -> None:
        """Keep the packets of a step, or record them at once where one is critical; on the training thread."""
        self._waiting.append(partial(record_packets, packets))
        if any(packet.level == _CRITICAL for packet in packets):
            self.write()

    def question_sent(self) -> None:
        """Write what waits in company while Tamiyo works, and later what comes of this question; on the loop."""
        if len(self._waiting) >= COMPANY:
            self._soon.ask()
        self._later.ask()

    def write(self) -> None:
        """Write what waits; on any thread."""
        while True:
            try:
                work = self._waiting.popleft()
            except IndexError:
                return
            work()
