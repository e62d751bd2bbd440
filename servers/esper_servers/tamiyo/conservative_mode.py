from __future__ import annotations

import threading
import time
from collections.abc import Callable

from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import tell_event
from esper_rpc.telemetry.metrics import observe_conservative

EXIT_SUCCESSES = 50
COOL_DOWN_SECONDS = 10.0


class ConservativeMode:
    """Holds back the policy after faults.

    Leaves by itself after a cool-down and a run of successes, when what it was entered for is over. Any thread may
    enter; successes are those of the loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, run_id: str = "") -> None:
        self._clock = clock
        self._context = {"run_id": run_id} if run_id else {}
        self._scope = "run" if run_id else "service"
        self._lock = threading.Lock()
        self.enabled = False
        self.reason = ""
        self._by_hand = False
        self._entered_at = 0.0
        self._successes = 0
        self._entries = 0
        self._ends: dict[str, Callable[[], bool]] = {}
        """By reason, what must be true to leave."""

    def enter(self, reason: str, *, by_hand: bool = False, until: Callable[[], bool] | None = None) -> None:
        """Turn on; entered by hand, it stays on until it is left by hand, else at least until `until` says so."""
        with self._lock:
            if not self.enabled:
                self._tell("conservative_entered", TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason)
                observe_conservative(self._scope, "operator" if by_hand else reason)
            self.enabled, self.reason, self._by_hand = True, reason, by_hand or self._by_hand
            self._entered_at, self._successes, self._entries = self._clock(), 0, self._entries + 1
            if until is not None:
                self._ends[reason] = until

    def leave(self) -> None:
        """Turn off."""
        self._leave(self._entries)

    def record_success(self) -> None:
        """Count a good decision towards leaving."""
        self._successes += 1
        entries = self._entries
        if self.enabled and self._successes >= EXIT_SUCCESSES and self._may_leave():
            self._leave(entries)

    def _leave(self, entries: int) -> None:
        with self._lock:
            if not self.enabled or entries != self._entries:
                return  # Another thread has entered since.
            self._tell("conservative_exited", TelemetryLevel.TELEMETRY_LEVEL_INFO, self.reason)
            self.enabled, self.reason, self._by_hand = False, "", False
            self._ends = {}

    def _may_leave(self) -> bool:
        """Asked without the lock: who enters may hold the very lock that an `until` waits for."""
        rested = self._clock() - self._entered_at >= COOL_DOWN_SECONDS
        return not self._by_hand and rested and all(is_over() for is_over in list(self._ends.values()))

    def _tell(self, name: str, level: TelemetryLevel.ValueType, reason: str) -> None:
        tell_event("tamiyo", name, level, reason=reason, step_index=None, **self._context)
