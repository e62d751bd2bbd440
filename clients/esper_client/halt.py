from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

Poll = Callable[[], None]
WAIT_SECONDS = 0.01


class HaltSwitch:
    """Whether the training stands still, for the thread that trains and for those who stop it.

    Looking is one read of an attribute. Any thread may engage and release; `hold` is for the training thread.
    """

    def __init__(self) -> None:
        self._released = threading.Event()
        self._released.set()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[bool, str], None]] = []
        self._polls: list[Poll] = []
        self._meanwhile: list[Poll] = []
        self.is_engaged = False
        self.reason = ""

    def engage(self, reason: str) -> None:
        """Have the training stand still."""
        with self._lock:
            changed, self.is_engaged, self.reason = not self.is_engaged, True, reason
            self._released.clear()
        if changed:
            self._tell(True, reason)

    def release(self, reason: str) -> None:
        """Let it go on."""
        with self._lock:
            changed, self.is_engaged, self.reason = self.is_engaged, False, ""
            self._released.set()
        if changed:
            self._tell(False, reason)

    def listen(self, listener: Callable[[bool, str], None]) -> Callable[[], None]:
        """Call a function with whether it stands still, and why, at every change; returns how to stop."""
        self._listeners.append(listener)

        def stop() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    def check_with(self, poll: Poll) -> None:
        """Call this at every `check` and while `hold` waits: it may engage or release. It must be cheap."""
        self._polls.append(poll)

    def meanwhile(self, work: Poll) -> None:
        """Call this again and again on the training thread while the training stands still."""
        self._meanwhile.append(work)

    def check(self) -> bool:
        """Look whether the training is to stand still."""
        for poll in self._polls:
            poll()
        return self.is_engaged

    def hold(self, timeout: float | None = None) -> bool:
        """Stay here while the training is to stand still; whether it may go on. At once when it may."""
        return self._wait(timeout) if self.check() else True

    def _wait(self, timeout: float | None) -> bool:
        ends_at = None if timeout is None else time.monotonic() + timeout
        while self.is_engaged:
            left = WAIT_SECONDS if ends_at is None else min(WAIT_SECONDS, ends_at - time.monotonic())
            if left <= 0:
                return False
            self._released.wait(left)
            for work in (*self._polls, *self._meanwhile):
                work()
        return True

    def _tell(self, is_engaged: bool, reason: str) -> None:
        for listener in tuple(self._listeners):
            listener(is_engaged, reason)
