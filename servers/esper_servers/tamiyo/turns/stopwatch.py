from __future__ import annotations

import time

from esper_rpc.proto.tamiyo.v1 import StepLedger


class Stopwatch:
    """Fills a ledger: each `lap` adds the time since the one before."""

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.ledger = StepLedger()
        self._last = time.perf_counter()
        self.ledger.queue_us = _microseconds(self._last - arrived)

    def lap(self, field: str) -> None:
        """Add the time since the last lap to a part."""
        now = time.perf_counter()
        setattr(self.ledger, field, getattr(self.ledger, field) + _microseconds(now - self._last))
        self._last = now

    def close(self) -> StepLedger:
        """Return the ledger with the time since the step arrived."""
        self.ledger.total_us = _microseconds(time.perf_counter() - self.arrived)
        return self.ledger

    def spent(self) -> float:
        """Seconds since the step arrived."""
        return time.perf_counter() - self.arrived


def _microseconds(seconds: float) -> int:
    """For a uint32: a machine that slept must not break the answer."""
    return min(2**32 - 1, max(0, int(seconds * 1e6)))
