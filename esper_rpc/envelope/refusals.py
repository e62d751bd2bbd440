from __future__ import annotations

import threading
from collections import Counter

import structlog

log = structlog.get_logger(__name__)


class Refusals:
    """How many envelopes a receiver rejected, by reason. Safe to use from any thread."""

    def __init__(self, event: str, **context: str) -> None:
        """`event` is what the log calls a rejection."""
        self._event = event
        self._context = context
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, reason: str) -> None:
        """Count one; the first of each reason is logged."""
        with self._lock:
            self._counts[reason] += 1
            is_first = self._counts[reason] == 1
        if is_first:
            log.warning(self._event, reason=reason, **self._context, priority="HIGH")

    def by_reason(self) -> dict[str, int]:
        """Return the counts."""
        with self._lock:
            return dict(self._counts)
