from __future__ import annotations

import contextlib
import itertools
import operator
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import structlog

from .breaker import BreakerConfig, CircuitBreaker
from .config import Range, validate
from .database import unopenable
from .disk import unwritable
from .telemetry.metrics import JOURNAL_LOST

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalConfig:
    """Bounds of a journal."""

    max_bytes: Annotated[int, Range(65_536, 2**40)] = 2 * 1024**3
    queue_records: Annotated[int, Range(1, 10_000_000)] = 65_536
    commit_records: Annotated[int, Range(1, 65_536)] = 512
    company: Annotated[int, Range(1, 65_536)] = 16
    """As many records that may wait for company are company enough."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, slots=True)
class Record:
    """One entry, found by its kind and key."""

    kind: str
    key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Takes what was written of a kind and key before it out of the journal."""

    kind: str
    key: str


@dataclass(frozen=True, slots=True)
class ForgottenBefore:
    """Takes everything of a kind that stands before a position out of the journal."""

    kind: str
    position: int


Entry = Record | Forgotten | ForgottenBefore


@dataclass(slots=True)
class _Flush:
    done: threading.Event


@dataclass(frozen=True, slots=True)
class _Made:
    make: Callable[[], Sequence[Entry]]


_Item = Record | _Made | _Flush | None

FLUSH_LOOK_SECONDS = 1.0
_WRITING: Mapping[type, tuple[str, Callable[[Entry], tuple[str | int | bytes, ...]]]] = {
    Record: (
        "INSERT INTO record (kind, key, body) VALUES (?, ?, ?)", operator.attrgetter("kind", "key", "body"),
    ),
    Forgotten: ("DELETE FROM record WHERE kind = ? AND key = ?", operator.attrgetter("kind", "key")),
    ForgottenBefore: ("DELETE FROM record WHERE kind = ? AND id < ?", operator.attrgetter("kind", "position")),
}  # fmt: skip

_SCHEMA = """
CREATE TABLE IF NOT EXISTS record (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS record_key ON record (kind, key);
CREATE INDEX IF NOT EXISTS record_kind ON record (kind);
"""


class JournalReader:
    """Reads what is on the disk; any process may, beside the one that writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, kind: str, key: str) -> Record | None:
        """Return the newest record of a kind and key that is on the disk."""
        with _reading(self._path) as connection:
            row = connection.execute(
                "SELECT kind, key, body FROM record WHERE kind = ? AND key = ? ORDER BY id DESC LIMIT 1", (kind, key)
            ).fetchone()
        return Record(*row) if row else None

    def find_all(self, kind: str, keys: Collection[str]) -> dict[str, Record]:
        """Return by key the newest record of each of a few hundred keys that is on the disk."""
        places = ", ".join("?" * len(keys))
        # By `id` alone SQLite would walk through the whole kind to spare itself the sorting of a few rows.
        query = f"SELECT kind, key, body FROM record WHERE kind = ? AND key IN ({places}) ORDER BY +id"  # noqa: S608
        with _reading(self._path) as connection:
            return {row[1]: Record(*row) for row in connection.execute(query, (kind, *keys))}

    def count(self, kind: str) -> int:
        """Return how many keys of a kind are on the disk."""
        with _reading(self._path) as connection:
            query = "SELECT COUNT(DISTINCT key) FROM record WHERE kind = ?"
            return int(connection.execute(query, (kind,)).fetchone()[0])

    def read(self, kind: str) -> Iterator[Record]:
        """Yield the records of a kind that are on the disk, oldest first."""
        with _reading(self._path) as connection:
            for row in connection.execute("SELECT kind, key, body FROM record WHERE kind = ? ORDER BY id", (kind,)):
                yield Record(*row)

    def page(self, kind: str, *, after: int, limit: int) -> list[tuple[int, Record]]:
        """Return the first records of a kind beyond a position, oldest first, each with its own; 0 is the start."""
        with _reading(self._path) as connection:
            rows = connection.execute(
                "SELECT id, kind, key, body FROM record WHERE kind = ? AND id > ? ORDER BY id LIMIT ?",
                (kind, after, limit),
            )
            return [(position, Record(*row)) for position, *row in rows]

    def position(self, kind: str, key: str) -> int | None:
        """Return where the newest record of a kind and key stands, as `page` tells it; None when there is none."""
        with _reading(self._path) as connection:
            query = "SELECT MAX(id) FROM record WHERE kind = ? AND key = ?"
            found: int | None = connection.execute(query, (kind, key)).fetchone()[0]
            return found

    def newest(self, kind: str) -> Iterator[Record]:
        """Yield the records of a kind that are on the disk, newest first."""
        with _reading(self._path) as connection:
            query = "SELECT kind, key, body FROM record WHERE kind = ? ORDER BY id DESC"
            for row in connection.execute(query, (kind,)):
                yield Record(*row)


class Journal(JournalReader):
    """Keeps records across crashes: SQLite in WAL mode, every commit synced, one writer thread.

    `append` returns at once and never waits for the disk. A full queue drops the record and counts it. Records of a
    kind in `kept` leave only when they are forgotten, not because the journal is full. While the breaker is open
    records are dropped without asking the disk; by default it is asked every time.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: JournalConfig | None = None,
        kept: AbstractSet[str] = frozenset(),
        breaker: CircuitBreaker | None = None,
    ) -> None:
        super().__init__(path)
        self._breaker = breaker or CircuitBreaker(config=BreakerConfig(cool_down_seconds=0))
        self._config = config or JournalConfig()
        self._kept = sorted(kept)
        self._queue: queue.Queue[_Item] = queue.Queue(self._config.queue_records)
        self._waiting: deque[_Made] = deque()
        """For company, before the queue."""
        self.dropped = 0
        self._is_failing = False
        self._made: set[tuple[str, str]] = set()
        """What was made for the batch that is not on the disk yet."""
        self._writer_connection = _open(path)
        self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
        self._writer.start()

    @property
    def queued(self) -> int:
        """About how many records wait for the disk."""
        return self._queue.qsize()

    def append(self, kind: str, key: str, body: bytes) -> None:
        """Queue a record."""
        self.hand_over()
        self._enqueue(Record(kind, key, body))

    def append_made(self, make: Callable[[], Sequence[Entry]], *, may_wait: bool = False) -> None:
        """Queue what takes long to write down; `make` is called on the writer's thread, in its turn.

        What `may_wait` does not wake the writer, which makes several in a row and commits them at once for little more
        than one. It goes with whatever is queued next, with enough of its kind, or with `hand_over`.
        """
        self._waiting.append(_Made(make))
        if not may_wait or len(self._waiting) >= self._config.company:
            self.hand_over()

    def hand_over(self) -> None:
        """Have the writer take what waits for company."""
        with contextlib.suppress(IndexError):  # Another thread may hand over too.
            while self._waiting:
                self._enqueue(self._waiting.popleft())

    def flush(self) -> None:
        """Wait until everything queued so far is on the disk."""
        self.hand_over()
        request = _Flush(threading.Event())
        self._queue.put(request)
        # A journal that was closed beside this call has nobody left who would answer.
        while not request.done.wait(FLUSH_LOOK_SECONDS) and self._writer.is_alive():
            pass

    def keep(self, kind: str, key: str, body: bytes) -> bool:
        """Write a record whose key is new, and wait for the disk; False when the disk did not take it."""
        self.append(kind, key, body)
        self.flush()
        return self.find(kind, key) is not None

    def holds(self, kind: str, key: str) -> bool:
        """Whether a record of a kind and key is on the disk, or was made for the batch that goes there next.

        For what makes records, on the writer's thread: a connection of its own would cost half a millisecond.
        """
        if (kind, key) in self._made:
            return True
        query = "SELECT EXISTS (SELECT 1 FROM record WHERE kind = ? AND key = ?)"
        return bool(self._writer_connection.execute(query, (kind, key)).fetchone()[0])

    def close(self) -> None:
        """Write what is queued and end."""
        if self._writer.is_alive():
            self.hand_over()
            self._queue.put(None)
            self._writer.join()
            self._writer_connection.close()

    def _enqueue(self, item: Record | _Made) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lose(1, "queue")

    def _write(self) -> None:
        while True:
            batch = self._drain()
            records = [record for item in batch for record in self._records_of(item)]
            if records:
                self._commit(records)
            self._made.clear()
            for item in batch:
                if isinstance(item, _Flush):
                    item.done.set()
            if None in batch:
                return

    def _records_of(self, item: _Item) -> Sequence[Entry]:
        if isinstance(item, Record):
            return (item,)
        try:
            made = item.make() if isinstance(item, _Made) else ()
            self._made.update((record.kind, record.key) for record in made if isinstance(record, Record))
            return made
        except Exception as error:  # A record that cannot be made must not end the writer.
            self._lose(1, "defect")
            log.error("journal_record_failed", path=str(self._path), exc_info=error)
            return ()

    def _drain(self) -> list[_Item]:
        batch = [self._queue.get()]
        while len(batch) < self._config.commit_records:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _commit(self, records: list[Entry]) -> None:
        if not self._breaker.allow():
            self._drop(records)
            return
        try:
            with self._writer_connection as connection:
                for kind, group in itertools.groupby(records, type):
                    statement, row_of = _WRITING[kind]
                    connection.executemany(statement, map(row_of, group))
                self._trim(connection)
        except sqlite3.Error as error:
            self._drop(records)
            self._note_failure(str(error))
            return
        self._breaker.record_success()
        if self._is_failing:
            self._is_failing = False
            log.info("journal_writes_again", path=str(self._path), dropped=self.dropped)

    def _drop(self, records: Sequence[Entry]) -> None:
        self._lose(sum(isinstance(record, Record) for record in records), "disk")

    def _lose(self, count: int, cause: str) -> None:
        self.dropped += count
        JOURNAL_LOST[cause].inc(count)

    def _note_failure(self, error: str) -> None:
        """A full disk fails at every commit and is told once."""
        self._breaker.record_failure()
        if not self._is_failing:
            self._is_failing = True
            log.error("journal_write_failed", path=str(self._path), error=error, priority="HIGH")

    def _trim(self, connection: sqlite3.Connection) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        if (pages - free) * size > self._config.max_bytes:
            droppable = f"FROM record WHERE kind NOT IN ({', '.join('?' * len(self._kept))})"
            query = f"SELECT MIN(id), MAX(id) {droppable}"
            least, most = connection.execute(query, self._kept).fetchone()
            if least is not None:
                connection.execute(f"DELETE {droppable} AND id <= ?", (*self._kept, least + (most - least) // 10))


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _connect(path)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    except sqlite3.Error as error:
        raise unopenable(path, error) from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(_SCHEMA)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


class _reading:  # noqa: N801  # Used like contextlib.closing.
    """A connection for one read, closed afterwards."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()
