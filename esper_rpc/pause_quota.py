from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

from .config import Range, validate


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseConfig:
    """How much one identity may pause. A unit is one millisecond."""

    units_per_window: Annotated[int, Range(0, 1_000_000_000)] = 10_000
    window_seconds: Annotated[float, Range(1, 86_400)] = 60.0
    units_per_request: Annotated[int, Range(1, 1_000_000_000)] = 1_000

    def __post_init__(self) -> None:
        validate(self)


@dataclass(slots=True)
class Spending:
    """Units that count until the window has moved past them."""

    principal: str
    units: int
    at: float


class PauseQuota:
    """Counts units in a sliding window per principal. What has left the window is forgotten, and its principal too.

    For use on one thread: nothing between the look at what is left and the spending of it lets another caller in.
    """

    def __init__(self, config: PauseConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._spendings: deque[Spending] = deque()
        self._spent: Counter[str] = Counter()

    def __len__(self) -> int:
        """Principals with anything in the window."""
        self._move_on()
        return len(self._spent)

    def remaining(self, principal: str) -> int:
        """Units that a principal may still be granted now."""
        self._move_on()
        return max(0, self.config.units_per_window - self._spent[principal])

    def least_remaining(self) -> int:
        """Units left to whoever has the fewest."""
        self._move_on()
        return max(0, self.config.units_per_window - max(self._spent.values(), default=0))

    def take(self, principal: str, units: int) -> Spending:
        """Spend as many of the units as there are."""
        granted = min(units, self.config.units_per_request, self.remaining(principal))
        spending = Spending(principal, granted, self._clock())
        self._count([spending])
        return spending

    def give_back(self, spending: Spending) -> None:
        """Undo a `take`; one that has left the window already has no units to undo."""
        left = self._spent[spending.principal] - spending.units
        if left > 0:
            self._spent[spending.principal] = left
        else:
            del self._spent[spending.principal]
        spending.units = 0

    def restore(self, past: Iterable[tuple[str, int, float]]) -> None:
        """Count what was granted before this process: principal, units and age in seconds of each. Call it first."""
        now = self._clock()
        found = [Spending(principal, units, now - age) for principal, units, age in past]
        self._count(sorted(found, key=lambda spending: spending.at))

    def _count(self, spendings: Iterable[Spending]) -> None:
        for spending in spendings:
            if spending.units:
                self._spendings.append(spending)
                self._spent[spending.principal] += spending.units

    def _move_on(self) -> None:
        oldest = self._clock() - self.config.window_seconds
        while self._spendings and self._spendings[0].at <= oldest:
            self.give_back(self._spendings.popleft())
