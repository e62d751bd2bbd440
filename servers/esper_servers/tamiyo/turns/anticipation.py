"""Rehearsing a step just before it is expected.

After a rest of some milliseconds others have had the caches, and a step takes half as long again. A trainer asks in a
rhythm, and works between its steps: a moment before the next the work of a step can be done once for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from esper_rpc.telemetry.metrics import REHEARSALS

log = structlog.get_logger(__name__)

SHORTEST_REST_SECONDS = 0.008
"""Within it nothing is forgotten."""
LONGEST_REST_SECONDS = 5.0
MOST_DEVIATION_SECONDS = 0.002
"""Of a less regular run the next step comes while it is rehearsed, or when all is forgotten again."""
LEAD_SECONDS = 0.002
"""From the end of a rehearsal to the step. A timer of the loop may be a millisecond late."""
MOST_COST_SECONDS = 0.005
"""What takes longer would be in the way more often than it helps."""
FIRST_COST_SECONDS = 0.002
ADAPTION = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class AnticipationConfig:
    """Whether steps are rehearsed."""

    enabled: bool = True
    """It makes a step shorter after a rest, and takes as much of a core once more while the trainer works."""


class Rhythm:
    """When a run asks: the time from step to step, and by how much it varies."""

    def __init__(self) -> None:
        self.last = -LONGEST_REST_SECONDS
        self._period = 0.0
        self._deviation = 0.0

    def note(self, now: float) -> None:
        """Take in the arrival of a step."""
        waited, self.last = now - self.last, now
        if not SHORTEST_REST_SECONDS <= waited <= LONGEST_REST_SECONDS:
            self._period = 0.0
        elif not self._period:
            self._period, self._deviation = waited, waited / 2
        else:
            error = waited - self._period
            self._period += ADAPTION * error
            self._deviation += ADAPTION * (abs(error) - self._deviation)

    @property
    def earliest(self) -> float | None:
        """When the next step may come; None where that cannot be said."""
        if not self._period or self._deviation > MOST_DEVIATION_SECONDS:
            return None
        return self.last + self._period - 2 * self._deviation


class CallLater(Protocol):
    """As of an event loop."""

    def __call__(self, delay: float, callback: Callable[..., object], *args: Any) -> object: ...


class Anticipation:
    """Has a step rehearsed shortly before it is expected. Used on one event loop, and nobody waits for it."""

    def __init__(
        self,
        config: AnticipationConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        call_later: CallLater | None = None,
    ) -> None:
        """`call_later` is that of the running loop."""
        self._is_enabled = (config or AnticipationConfig()).enabled
        self._clock = clock
        self._call_later = call_later
        self._cost = FIRST_COST_SECONDS
        self._last_ended = clock()

    def expect(self, rhythm: Rhythm, arrived: float, rehearse: Callable[[], object]) -> None:
        """Plan for the step after one that arrived then and is answered now."""
        if not self._is_enabled:
            return
        rhythm.note(arrived)
        now = self._last_ended = self._clock()
        earliest = rhythm.earliest
        if earliest is None or self._cost > MOST_COST_SECONDS:
            return
        delay = earliest - self._cost - LEAD_SECONDS - now
        if delay > 0:
            call_later = self._call_later or asyncio.get_running_loop().call_later
            call_later(delay, self._rehearse, rhythm, arrived, rehearse)

    def _rehearse(self, rhythm: Rhythm, planned_at: float, rehearse: Callable[[], object]) -> None:
        begun = self._clock()
        # It came early, or others keep everything at hand.
        if rhythm.last != planned_at or begun - self._last_ended < SHORTEST_REST_SECONDS / 2:
            return
        try:
            rehearse()
        except Exception as error:  # noqa: BLE001  # The step will meet it too, and tell.
            log.debug("rehearsal_failed", error=repr(error)[:200])
        self._cost += ADAPTION * (self._clock() - begun - self._cost)
        REHEARSALS.inc()
