from __future__ import annotations

import threading
from collections.abc import Callable

from esper_rpc.proto.leyline.v1 import TelemetryLevel

from .telemetry import tell

TIMEOUT_SCALE = 2.0
SAMPLE_EVERY = 10


class ConservativeMode:
    """The trainer does without what it can do without, for as long as there is a reason. Any thread may enter.

    Each reason is left by whoever gave it. Meanwhile enriched metrics are left out, one step in ten is shown, and
    peers are waited for twice as long, off the training thread.
    """

    def __init__(self, step_of: Callable[[], int] = lambda: 0) -> None:
        self._step_of = step_of
        self._lock = threading.Lock()
        self._reasons: tuple[str, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether there is a reason."""
        return bool(self._reasons)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons, in the order in which they came."""
        return self._reasons

    @property
    def timeout_scale(self) -> float:
        """By what time limits of peers are multiplied."""
        return TIMEOUT_SCALE if self.is_active else 1.0

    @property
    def sample_every(self) -> int:
        """One in so many steps is shown."""
        return SAMPLE_EVERY if self.is_active else 1

    def enter(self, reason: str) -> None:
        """Give a reason."""
        with self._lock:
            was_active, is_new = self.is_active, reason not in self._reasons
            if is_new:
                self._reasons = (*self._reasons, reason)
        if is_new and not was_active:
            step = self._step_of()
            tell("conservative_mode_triggered", TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason=reason, step_index=step)

    def leave(self, reason: str) -> None:
        """Take a reason back."""
        with self._lock:
            was_active = self.is_active
            self._reasons = tuple(each for each in self._reasons if each != reason)
            is_over = was_active and not self.is_active
        if is_over:
            step = self._step_of()
            tell("conservative_mode_left", TelemetryLevel.TELEMETRY_LEVEL_INFO, reason=reason, step_index=step)
