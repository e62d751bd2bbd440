from __future__ import annotations

import logging
import logging.handlers
import queue
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import orjson
import structlog

log = structlog.get_logger("audit")

FILE_BYTES = 10 * 1024 * 1024
FILES_KEPT = 5
QUEUED_RECORDS = 4096
REPEAT_SECONDS = 1.0
CAUSES_KEPT = 1024

Cause = tuple[str, str, str]
"""Peer, method, reason."""


class AuditLog:
    """Who was refused what, and who did what only an operator may: in the log, and as JSON lines in a file.

    The same refusal within a second is counted and written once, so that a flood cannot fill the disk. Writing happens
    on a thread of its own; what does not fit its queue is dropped and counted.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: dict[Cause, tuple[float, int]] = {}
        self.dropped = 0
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(QUEUED_RECORDS)
        self._listener = _listener(path, self._records) if path is not None else None

    def refused(self, peer: str, method: str, reason: str) -> None:
        """Note a refusal."""
        now, cause = self._clock(), (peer, method, reason)
        last, repeated = self._recent.get(cause, (-REPEAT_SECONDS, 0))
        if now - last < REPEAT_SECONDS:
            self._recent[cause] = (last, repeated + 1)
            return
        self._recent.pop(cause, None)
        self._recent[cause] = (now, 0)
        while len(self._recent) > CAUSES_KEPT:
            self._recent.pop(next(iter(self._recent)))
        self._write("refused", peer, method, reason=reason, repeated_before=repeated)

    def admitted(self, peer: str, method: str) -> None:
        """Note an admin call."""
        self._write("admin_call", peer, method)

    def close(self) -> None:
        """Write what is queued and end."""
        if self._listener is not None:
            self._listener.stop()
            for handler in self._listener.handlers:
                handler.close()
            self._listener = None

    def _write(self, event: str, peer: str, method: str, **details: object) -> None:
        log.warning(event, peer=peer, method=method, **details)
        if self._listener is None:
            return
        now = datetime.now(UTC).isoformat()
        line = orjson.dumps({"at": now, "event": event, "peer": peer, "method": method, **details}).decode()
        try:
            self._records.put_nowait(logging.makeLogRecord({"msg": line}))
        except queue.Full:
            self.dropped += 1


def _listener(path: Path, records: queue.Queue[logging.LogRecord]) -> logging.handlers.QueueListener:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = logging.handlers.RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT)
    listener = logging.handlers.QueueListener(records, file)
    listener.start()
    return listener
