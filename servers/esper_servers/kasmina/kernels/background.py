from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

Work = Callable[[], object]
IDLE_SECONDS = 10.0


class BackgroundWorker:
    """Does work in order on one daemon thread, which comes with work, never holds up an exit, and ends when idle."""

    def __init__(self, name: str, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._name = name
        self._idle_seconds = idle_seconds
        self._arrival = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._thread: threading.Thread | None = None

    def __call__(self, work: Work) -> None:
        """Leave work."""
        with self._arrival:
            self._waiting.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._arrival.notify()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception as error:
                log.error("background_work_failed", exc_info=error)

    def _next(self) -> Work | None:
        with self._arrival:
            self._arrival.wait_for(lambda: self._waiting, self._idle_seconds)
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None
