from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTiming:
    """Where the time of one step went on the caller's side, in microseconds."""

    build: float
    """Building and serialising the request."""
    exchange: float
    """From sending to the answer, or to the end of the budget; without what the loop did meanwhile."""
    server: float
    """Of that, what the server's ledger accounts for."""
    verify: float
    apply: float
    total: float

    @property
    def wire(self) -> float:
        """Of the exchange, what the server does not account for."""
        return max(0.0, self.exchange - self.server)


class TimingWindow:
    """The last timings, in constant memory."""

    def __init__(self, size: int = 4096) -> None:
        self._timings: deque[StepTiming] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._timings)

    @property
    def last(self) -> StepTiming | None:
        """The newest timing; None before the first."""
        return self._timings[-1] if self._timings else None

    def add(self, timing: StepTiming) -> None:
        """Keep a timing, forgetting the oldest."""
        self._timings.append(timing)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return p50, p95 and p99 in milliseconds of every part."""
        rows = [asdict(t) | {"wire": t.wire} for t in self._timings]
        parts = rows[0] if rows else {}
        return {part: percentiles_ms(row[part] for row in rows) for part in parts}


def percentiles_ms(values_us: Iterable[float]) -> dict[str, float]:
    """Return p50, p95 and p99 (nearest rank) in milliseconds."""
    ordered = sorted(values_us)
    if not ordered:
        return {"p50_ms": 0.0, "p95_ms": 0.0, "p99_ms": 0.0}
    last = len(ordered) - 1
    return {f"p{p}_ms": round(ordered[min(last, int(len(ordered) * p / 100))] / 1e3, 4) for p in (50, 95, 99)}
