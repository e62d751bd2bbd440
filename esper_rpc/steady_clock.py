from __future__ import annotations

import time
from collections.abc import Callable


class SteadyClock:
    """The time of day as it was when this was made, carried on by the monotonic clock, in nanoseconds since 1970.

    Whoever stamps and whoever told the receiver the time must agree: a clock that an operator or NTP steps while a run
    is open would make every command stale, or come from the future.
    """

    def __init__(
        self, wall_ns: Callable[[], int] = time.time_ns, monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._offset_ns = wall_ns() - monotonic_ns()

    def __call__(self) -> int:
        """Tell the time."""
        return self._offset_ns + self._monotonic_ns()
