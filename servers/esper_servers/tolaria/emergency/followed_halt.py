from __future__ import annotations

import contextlib

import structlog

from esper_client.halt import HaltSwitch

from .levels import RESPONSES
from .shared_signal import SharedSignal

log = structlog.get_logger(__name__)


class FollowedHalt:
    """Halts another process of a run with the run, as the memory says that they share on the host."""

    def __init__(self, shared: SharedSignal, halt: HaltSwitch, name: str) -> None:
        self._shared: SharedSignal | None = shared
        self._halt = halt
        self._name = name
        halt.check_with(self.poll)

    def poll(self) -> None:
        """Take over what is in force. Cheap; it never raises. Without the memory this process goes on."""
        if self._shared is None:
            return
        try:
            found = self._shared.poll()
            if found is not None:
                self._follow(RESPONSES[found.level].halts if found.level in RESPONSES else False, found.reason)
                self._shared.acknowledge(self._name)
        except OSError as error:
            log.warning("halt_followed_no_more", problem=str(error))
            self.close()

    def close(self) -> None:
        """Follow no more."""
        shared, self._shared = self._shared, None
        with contextlib.suppress(OSError):
            if shared is not None:
                shared.close()
        self._halt.release("the run is not followed any more")

    def _follow(self, halts: bool, reason: str) -> None:
        if halts:
            self._halt.engage(reason)
        else:
            self._halt.release(reason)
