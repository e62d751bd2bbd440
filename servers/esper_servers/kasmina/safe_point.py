from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class SafePoint:
    """Work that changes the model, left by other threads for the training thread."""

    def __init__(self, *, has_training_thread: bool) -> None:
        self._has_training_thread = has_training_thread
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Leave work for the next safe point, or do it at once when there is no training thread."""
        done: Future[Any] = Future()
        if self._has_training_thread:
            self._waiting.append((work, done))
        else:
            _run(work, done)
        return done

    def reach(self) -> None:
        """Do what waits; call it on the training thread."""
        while self._waiting:
            _run(*self._waiting.popleft())

    def close(self) -> None:
        """Give up what waits: no safe point will come."""
        while self._waiting:
            self._waiting.popleft()[1].cancel()


def _run(work: Callable[[], Any], done: Future[Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(work())
    except Exception as error:  # noqa: BLE001  # It belongs to whoever waits for the result.
        done.set_exception(error)
