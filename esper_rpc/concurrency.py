from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from .config import Range, validate
from .errors import ResourceExhausted

STEP, EPOCH, BULK = 1.0, 0.8, 0.5
"""The share of the limit up to which a call of this rank is admitted: bulk gives way first, a step last."""

_SMOOTHING = 0.2
_LONG_WINDOW = 600
_TOLERANCE = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ConcurrencyConfig:
    """Bounds of the adaptive limit."""

    initial: Annotated[int, Range(1, 100_000)] = 64
    least: Annotated[int, Range(1, 100_000)] = 8
    most: Annotated[int, Range(1, 100_000)] = 1024

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True)
class Place:
    """One call that is being served."""

    since: float
    in_flight: int


class ConcurrencyLimit:
    """How many calls are served at once, adapted to the latency that is measured.

    The gradient of the short to the long average of latency shrinks the limit when a queue builds up, and the square
    root of the limit is what it may grow by (Netflix concurrency-limits, Gradient2). Used on one event loop.
    """

    def __init__(self, config: ConcurrencyConfig | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._config = config or ConcurrencyConfig()
        self._clock = clock
        self._limit = float(self._config.initial)
        self._long = 0.0
        self._samples = 0
        self.in_flight = 0
        self.refused = 0

    @property
    def limit(self) -> int:
        """How many calls may be in flight at present."""
        return int(self._limit)

    def acquire(self, rank: float) -> Place:
        """Take a place; raises ResourceExhausted at once when there is none for this rank."""
        if self.in_flight >= max(1.0, self._limit * rank):
            self.refused += 1
            raise ResourceExhausted(
                f"This server works on {self.in_flight} calls already.",
                reason="OVERLOADED",
                retry_after_ms=self._retry_after_ms(),
            )
        self.in_flight += 1
        return Place(self._clock(), self.in_flight)

    def release(self, place: Place) -> None:
        """Give a place back, and learn from how long it was held."""
        self.in_flight -= 1
        self._learn(self._clock() - place.since, place.in_flight)

    def _retry_after_ms(self) -> int:
        return max(1, math.ceil(self._long * 1000 * 2))

    def _learn(self, seconds: float, in_flight: int) -> None:
        self._samples += 1
        window = min(self._samples, _LONG_WINDOW)
        self._long += (seconds - self._long) / window
        if self._long > 2 * seconds:
            self._long *= 0.95  # Coming back from overload: forget it faster than the window does.
        if in_flight < self._limit / 2:
            return  # What was hardly used says nothing about the limit.
        gradient = max(0.5, min(1.0, _TOLERANCE * self._long / max(seconds, 1e-9)))
        wanted = self._limit * gradient + math.sqrt(self._limit)
        smoothed = self._limit * (1 - _SMOOTHING) + wanted * _SMOOTHING
        self._limit = max(self._config.least, min(self._config.most, smoothed))
