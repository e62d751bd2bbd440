from __future__ import annotations

import threading
import uuid
from collections import Counter

from esper_rpc.proto.leyline.v1 import CommandOutcome, TelemetryEvent, TelemetryLevel

NAME = "command_rejected"
TOLD_EACH = 32
LONGEST_ID = 128


class Rejections:
    """What was rejected since the last step, as events for its packets; safe to use from any thread.

    The first ones are told each, the rest as a number by reason, so that a flood of forged envelopes stays small.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: list[tuple[str, str]] = []
        self._rest: Counter[str] = Counter()

    def note(self, outcome: CommandOutcome) -> None:
        """Keep a rejection until the end of the step."""
        with self._lock:
            if len(self._first) < TOLD_EACH:
                # Whoever forges an envelope chooses the length of its nonce.
                self._first.append((outcome.reason, outcome.command_id[:LONGEST_ID]))
            else:
                self._rest[outcome.reason] += 1

    def take(self, step_index: int) -> list[TelemetryEvent]:
        """Return what was noted since the last call."""
        with self._lock:
            first, rest = self._first, self._rest
            self._first, self._rest = [], Counter()
        each = [_event(step_index, reason, command_id=command_id) for reason, command_id in first]
        return each + [_event(step_index, reason, count=str(count)) for reason, count in rest.items()]


def _event(step_index: int, reason: str, **details: str) -> TelemetryEvent:
    return TelemetryEvent(
        event_id=str(uuid.uuid4()),
        description=NAME,
        level=TelemetryLevel.TELEMETRY_LEVEL_WARNING,
        attributes={"reason": reason, "priority": "HIGH", "step_index": str(step_index), **details},
    )
