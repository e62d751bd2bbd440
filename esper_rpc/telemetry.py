from __future__ import annotations

import bisect
import threading
from collections import Counter

# Microseconds; a step has a budget of 2 to 50 ms.
LATENCY_BUCKETS_US = (50, 100, 200, 300, 500, 750, 1_000, 1_500, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Counts in fixed buckets: constant memory, no allocation per value."""

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BUCKETS_US) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def quantile(self, share: float) -> float:
        """Return the upper bound of the bucket that holds this share of the values; infinity beyond the last."""
        wanted, seen = share * sum(self.counts), 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0


class Recorder:
    """Counters and histograms of one process, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        self.histograms: dict[str, Histogram] = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[name] += amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        with self._lock:
            self.histograms.setdefault(name, Histogram()).observe(value)
