from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from esper_client.seed_host import OutOfStep

Result = TypeVar("Result")


class StepEnd:
    """Work that other threads leave for the training thread, for when a step is done and the next has not begun."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Leave work, from any thread; it is cancelled when no step ends any more."""
        done: Future[Result] = Future()
        self._waiting.append((work, done))
        return done

    def reach(self) -> bool:
        """Do what waits, on the training thread; whether there was any. Raises OutOfStep alone."""
        found = bool(self._waiting)
        while self._waiting:
            work, done = self._waiting.popleft()
            if done.set_running_or_notify_cancel():
                _do(work, done)
        return found

    def close(self) -> None:
        """Cancel what waits."""
        while self._waiting:
            self._waiting.popleft()[1].cancel()


def _do(work: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(work())
    except Exception as error:
        # It belongs to whoever waits for the result, but for a rank that is gone, which ends the loop.
        done.set_exception(error)
        if isinstance(error, OutOfStep):
            raise
