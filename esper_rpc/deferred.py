from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deferred:
    """Work that is done once, a moment after it was asked for, however often it is asked for meanwhile.

    For what an answer need not wait for: a timer of its own for each answer would wake the loop once more each time.
    Used on one event loop.
    """

    def __init__(self, seconds: float, work: Callable[[], object]) -> None:
        self._seconds = seconds
        self._work = work
        self._is_due = False

    def ask(self) -> None:
        """Have the work done soon."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(self._seconds, self._do)

    def _do(self) -> None:
        self._is_due = False
        self._work()
