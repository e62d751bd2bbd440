from __future__ import annotations

import itertools
from collections import deque
from typing import NamedTuple

Noted = tuple[str, int, bytes, bytes, str, int, bool]
"""An AnsweredStep without names: the garbage collector stops looking at a plain tuple of texts and numbers."""

MOST_STEPS = 4096
MOST_BYTES = 32 * 1024**2
OVERHEAD_BYTES = 512
"""What a step takes beside its request and its reply."""


class AnsweredStep(NamedTuple):
    """A step as it came and as it was answered."""

    run_id: str
    sequence: int
    request: bytes
    reply: bytes
    policy_version: str
    answered_ns: int
    """Since the Unix epoch."""
    is_epoch: bool
    """Whether the request is an EvaluateEpochRequest, and not an EvaluateStepsRequest."""

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return len(self.request) + len(self.reply) + OVERHEAD_BYTES


class FlightRecorder:
    """The last steps of all runs, in memory. Used on one event loop."""

    def __init__(self, *, most_steps: int = MOST_STEPS, most_bytes: int = MOST_BYTES) -> None:
        self._most_steps = most_steps
        self._most_bytes = most_bytes
        self._steps: deque[Noted] = deque()
        self._bytes = 0
        self.noted = 0
        """How many steps it has seen."""

    def note(
        self, run_id: str, sequence: int, request: bytes, reply: bytes, policy_version: str, answered_ns: int,
        is_epoch: bool,
    ) -> None:  # fmt: skip
        """Keep a step, and let go of the oldest beyond the bounds; takes a microsecond of the step path."""
        self._steps.append((run_id, sequence, request, reply, policy_version, answered_ns, is_epoch))
        self._bytes += len(request) + len(reply) + OVERHEAD_BYTES
        self.noted += 1
        while self._bytes > self._most_bytes or len(self._steps) > self._most_steps:
            oldest = self._steps.popleft()
            self._bytes -= len(oldest[2]) + len(oldest[3]) + OVERHEAD_BYTES

    def since(self, noted: int) -> deque[Noted]:
        """Return what is kept of the steps after the first `noted` ones, oldest first."""
        known = max(0, len(self._steps) - (self.noted - noted))
        return deque(itertools.islice(self._steps, known, None))
