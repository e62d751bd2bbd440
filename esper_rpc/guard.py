from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class StepGuard(Generic[Answer]):
    """Bounds how long a step waits for its answer, by a local wait on the monotonic clock.

    A gRPC deadline fires about 2.5 ms late; this wait about 0.1 ms. One thread waits; any thread resolves. An answer
    to anything but the armed sequence is late: counted, never handed on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived = threading.Semaphore(0)
        self._armed: int | None = None
        self._answer: Answer | None = None
        self.late_answers = 0
        self.misses = 0
        self.last_overshoot_seconds = 0.0

    def arm(self, sequence: int) -> float:
        """Expect the answer to this sequence; returns the time from which the budget counts."""
        with self._lock:
            self._armed = sequence
            self._answer = None
            self._arrived = threading.Semaphore(0)
        return self._clock()

    def awaits(self, sequence: int) -> bool:
        """Whether the answer to this sequence would still be in time."""
        return self._armed == sequence

    def resolve(self, sequence: int, answer: Answer) -> bool:
        """Hand over an answer; returns False, and counts it, when it comes too late."""
        with self._lock:
            if self._armed != sequence:
                self.late_answers += 1
                return False
            self._armed = None
            self._answer = answer
            self._arrived.release()
            return True

    def wait(self, started: float, budget_seconds: float) -> Answer | None:
        """Wait for the armed answer until the budget has passed since `started`; None is a miss."""
        remaining = started + budget_seconds - self._clock()
        self._arrived.acquire(timeout=max(0.0, remaining))
        with self._lock:
            self._armed = None
            if self._answer is not None:
                return self._answer
            self.misses += 1
            self.last_overshoot_seconds = max(0.0, self._clock() - started - budget_seconds)
            return None
