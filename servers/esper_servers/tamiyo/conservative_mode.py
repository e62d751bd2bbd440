from __future__ import annotations

import time
from collections.abc import Callable

from esper_rpc.proto.leyline.v1 import TelemetryLevel
from esper_rpc.telemetry.events import tell_event

EXIT_SUCCESSES = 50
COOL_DOWN_SECONDS = 10.0


class ConservativeMode:
    """Holds back the policy after faults. Leaves by itself after a cool-down and a run of successes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, run_id: str = "") -> None:
        self._clock = clock
        self._context = {"run_id": run_id} if run_id else {}
        self.enabled = False
        self.reason = ""
        self._by_hand = False
        self._entered_at = 0.0
        self._successes = 0

    def enter(self, reason: str, *, by_hand: bool = False) -> None:
        """Turn on; entered by hand, it stays on until it is left by hand."""
        if not self.enabled:
            self._tell("conservative_entered", TelemetryLevel.TELEMETRY_LEVEL_ERROR, reason)
        self.enabled, self.reason, self._by_hand = True, reason, by_hand or self._by_hand
        self._entered_at, self._successes = self._clock(), 0

    def leave(self) -> None:
        """Turn off."""
        if self.enabled:
            self._tell("conservative_exited", TelemetryLevel.TELEMETRY_LEVEL_INFO, self.reason)
        self.enabled, self.reason, self._by_hand = False, "", False

    def record_success(self) -> None:
        """Count a good decision towards leaving."""
        self._successes += 1
        rested = self._clock() - self._entered_at >= COOL_DOWN_SECONDS
        if self.enabled and not self._by_hand and rested and self._successes >= EXIT_SUCCESSES:
            self.leave()

    def _tell(self, name: str, level: TelemetryLevel.ValueType, reason: str) -> None:
        tell_event("tamiyo", name, level, reason=reason, step_index=None, **self._context)
