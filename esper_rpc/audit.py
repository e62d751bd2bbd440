from __future__ import annotations

import contextlib
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import orjson
import structlog

from .disk import unwritable
from .telemetry.metrics import AUDIT_LOST

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
    on a thread of its own; what does not fit its queue or its disk is lost and counted.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: dict[Cause, tuple[float, int]] = {}
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
            AUDIT_LOST["queue"].inc()


class _File(logging.handlers.RotatingFileHandler):
    """A file that outlives a full disk: what it cannot keep is counted, and told when that begins."""

    _is_failing = _has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._has_failed = False
        super().emit(record)
        if self._is_failing and not self._has_failed:
            log.info("audit_writes_again", path=self.baseFilename)
        self._is_failing = self._has_failed

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a record that could not be written."""
        AUDIT_LOST["disk"].inc()
        if not self._is_failing:
            log.error("audit_write_failed", path=self.baseFilename, error=str(sys.exception()), priority="HIGH")
        self._has_failed = True
        self._forget()

    def _forget(self) -> None:
        """Open the file anew for the next record: what the stream still holds is counted as lost already."""
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _open(path: Path) -> _File:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _File(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def _listener(path: Path, records: queue.Queue[logging.LogRecord]) -> logging.handlers.QueueListener:
    listener = logging.handlers.QueueListener(records, _open(path))
    listener.start()
    return listener
